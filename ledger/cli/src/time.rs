//! UTC times on the command line and in tables, without a calendar library.

use satgrid_types::UnixMs;

const DAY_S: u64 = 86_400;

/// Days from 1970-01-01 to a date of the Gregorian calendar (years 1970 to 9999).
fn days(year: u64, month: u64, day: u64) -> u64 {
    // Counted in years that begin in March, so that the leap day is the last of its year.
    let (y, m) = if month <= 2 { (year - 1, month + 9) } else { (year, month - 3) };
    365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + (day - 1) - 719_468
}

/// Year, month and day of a day number.
fn date(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + u64::from(month <= 2), month, doy - (153 * mp + 2) / 5 + 1)
}

/// `2026-01-31`.
pub(crate) fn day(at: UnixMs) -> String {
    let (year, month, day) = date(at.as_secs() / DAY_S);
    format!("{year:04}-{month:02}-{day:02}")
}

/// `2026-01-31T12:00:00.123Z`.
pub(crate) fn utc(at: UnixMs) -> String {
    let seconds = at.as_secs() % DAY_S;
    let (hour, minute, second) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
    format!("{}T{hour:02}:{minute:02}:{second:02}.{:03}Z", day(at), at.0 % 1_000)
}

/// `2026-01-31 12:00:00`.
pub(crate) fn seconds(at: UnixMs) -> String {
    utc(at).get(..19).unwrap_or_default().replace('T', " ")
}

/// Reads `2026-01-31`, `2026-01-31T12:00:00Z` or Unix seconds.
pub(crate) fn parse_time(text: &str) -> Result<UnixMs, String> {
    let bad = || format!("{text:?} is no time; try 2026-01-31, 2026-01-31T12:00:00Z or Unix seconds");
    if let Ok(seconds) = text.parse::<u64>() {
        return Ok(UnixMs::from_secs(seconds));
    }
    let (on, at) = text.split_once('T').map_or((text, "00:00:00Z"), |(on, at)| (on, at));
    let numbers = |text: &str, separator| -> Option<[u64; 3]> {
        let parts: Vec<u64> = text.split(separator).map(|part| part.parse().ok()).collect::<Option<_>>()?;
        parts.try_into().ok()
    };
    let [year, month, dom] = numbers(on, '-').ok_or_else(bad)?;
    let [hour, minute, second] = at.strip_suffix('Z').and_then(|at| numbers(at, ':')).ok_or_else(bad)?;
    if !(1970..=9999).contains(&year)
        || !(1..=12).contains(&month)
        || dom == 0
        || hour > 23
        || minute > 59
        || second > 59
    {
        return Err(bad());
    }
    let number = days(year, month, dom.min(31));
    if date(number) != (year, month, dom) {
        return Err(bad());
    }
    Ok(UnixMs::from_secs(number * DAY_S + hour * 3_600 + minute * 60 + second))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, seconds: u64, shown: &str) {
        assert_eq!(parse_time(text), Ok(UnixMs::from_secs(seconds)));
        assert_eq!(utc(UnixMs::from_secs(seconds)), shown);
    }

    #[test]
    fn times_read_and_show() {
        check("1970-01-01", 0, "1970-01-01T00:00:00.000Z");
        check("2000-02-29T23:59:59Z", 951_868_799, "2000-02-29T23:59:59.000Z");
        check("2026-01-01", 1_767_225_600, "2026-01-01T00:00:00.000Z");
        check("1767225600", 1_767_225_600, "2026-01-01T00:00:00.000Z");
        check("2100-03-01", 4_107_542_400, "2100-03-01T00:00:00.000Z");
        for bad in [
            "",
            "2026-13-01",
            "2026-02-29",
            "2026-02-00",
            "yesterday",
            "2026-01-01T25:00:00Z",
            "2026-01-01T00:00:00",
            "2026-04-31",
        ] {
            assert!(parse_time(bad).is_err(), "{bad}");
        }
    }
}
