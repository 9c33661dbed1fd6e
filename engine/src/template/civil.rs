//! A date and time as a template prints it. Given by the caller: this room has no clock.

use std::fmt::Write;

/// A moment of the proleptic Gregorian calendar, without a time zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CivilTime {
    pub year: i64,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
    pub hour: u8,
    pub minute: u8,
    pub second: u8,
    /// 0 is Monday.
    weekday: u8,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

impl CivilTime {
    /// Seconds since 1970-01-01 00:00:00 UTC; add the zone's offset first where local time is wanted.
    pub fn from_unix(seconds: i64) -> Self {
        let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        // Days to date, counted in eras of 400 years that begin in March, so that a leap day ends its year.
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
        let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        Self {
            year,
            month: month as u8,
            day: (day_of_year - (153 * march_month + 2) / 5 + 1) as u8,
            hour: (rest / 3_600) as u8,
            minute: (rest / 60 % 60) as u8,
            second: (rest % 60) as u8,
            weekday: (days + 3).rem_euclid(7) as u8,
        }
    }

    /// The directives of C's `strftime` that templates use; an unknown one stays as it is.
    pub fn format(&self, format: &str) -> String {
        let mut out = String::new();
        let mut rest = format.chars();
        while let Some(char) = rest.next() {
            if char != '%' {
                out.push(char);
                continue;
            }
            let mut directive = rest.next();
            let unpadded = directive == Some('-');
            if unpadded {
                directive = rest.next();
            }
            let Some(directive) = directive else {
                out.push('%');
                break;
            };
            self.one(directive, unpadded, &mut out);
        }
        out
    }

    fn one(&self, directive: char, unpadded: bool, out: &mut String) {
        let mut two = |number: u8| {
            let _ = if unpadded { write!(out, "{number}") } else { write!(out, "{number:02}") };
        };
        let name = |names: &[&'static str], at: u8| names.get(usize::from(at)).copied().unwrap_or("");
        match directive {
            'd' => two(self.day),
            'm' => two(self.month),
            'H' => two(self.hour),
            'I' => two((self.hour + 11) % 12 + 1),
            'M' => two(self.minute),
            'S' => two(self.second),
            'y' => two(self.year.rem_euclid(100) as u8),
            'Y' => out.push_str(&self.year.to_string()),
            'B' => out.push_str(name(&MONTHS, self.month.wrapping_sub(1))),
            'b' | 'h' => out.extend(name(&MONTHS, self.month.wrapping_sub(1)).chars().take(3)),
            'A' => out.push_str(name(&DAYS, self.weekday)),
            'a' => out.extend(name(&DAYS, self.weekday).chars().take(3)),
            'p' => out.push_str(if self.hour < 12 { "AM" } else { "PM" }),
            'F' => out.push_str(&self.format("%Y-%m-%d")),
            'T' => out.push_str(&self.format("%H:%M:%S")),
            '%' => out.push('%'),
            other => {
                out.push('%');
                out.push(other);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_the_calendar_s() {
        let check = |seconds: i64, format: &str, expect: &str| {
            assert_eq!(CivilTime::from_unix(seconds).format(format), expect, "{seconds}");
        };
        check(0, "%F %T %A", "1970-01-01 00:00:00 Thursday");
        check(-1, "%F %T %a", "1969-12-31 23:59:59 Wed");
        check(951_782_400, "%d %B %Y", "29 February 2000");
        check(1_709_251_199, "%d %b %Y %H:%M", "29 Feb 2024 23:59");
        check(4_102_444_800, "%Y-%m-%d", "2100-01-01");
        check(1_772_668_800, "%-d/%-m/%y, %I %p", "5/3/26, 12 AM");
        check(0, "100%% %Q %", "100% %Q %");
    }
}
