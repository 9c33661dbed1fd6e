//! The bill as tables for people.

use std::fmt::Write;

use super::bill::Bill;
use super::chat::Chat;
use super::nodes::{ForSale, Market};
use crate::commands::print;

/// Digits in groups of three.
fn grouped(number: impl std::fmt::Display) -> String {
    let text = number.to_string();
    let (sign, digits) = text.strip_prefix('-').map_or(("", text.as_str()), |digits| ("-", digits));
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at) % 3 == 0 {
            out.push(',');
        }
        out.push(digit);
    }
    format!("{sign}{out}")
}

fn section(out: &mut String, title: &str, table: &str) {
    let _ = write!(out, "\n{title}\n{table}\n");
}

fn right(cell: impl std::fmt::Display) -> String {
    format!("{:>15}", grouped(cell))
}

pub(super) fn bill(bill: &Bill, chat: &Chat) -> String {
    let mut out = String::new();
    section(&mut out, "THE ANSWER", &answer(chat));
    section(&mut out, "THE BILL (msat)", &costs(bill, chat));
    section(&mut out, "SLICES, each one Lightning payment", &slices(bill));
    section(
        &mut out,
        &format!("RECEIPTS, signed by both sides ({} acknowledgements before)", bill.acks),
        &receipts(bill),
    );
    section(
        &mut out,
        "LIGHTNING BALANCES (msat), from the wallets' own lists, and what the ledgers say",
        &wallets(bill),
    );
    section(&mut out, "THE MOST THAT EACH SIDE COULD HAVE LOST (msat)", &exposures(bill));
    section(&mut out, "AUDIT, by satgrid-ledger verify on the exported files", &audit(bill));
    section(&mut out, "COMPARED TO THE MSAT", &checks(bill));
    out
}

fn answer(chat: &Chat) -> String {
    let usage = &chat.usage;
    let rows = vec![
        vec![
            "tokens".to_owned(),
            format!("{} in, {} out ({})", usage.prompt_tokens, usage.completion_tokens, chat.finish_reason),
        ],
        vec![
            "time to first token".to_owned(),
            format!("{} ms, session and first payment included", chat.first_token_ms),
        ],
        vec![
            "speed".to_owned(),
            format!("{:.1} tokens/s while paying; {} ms in all", chat.tokens_per_s, chat.total_ms),
        ],
    ];
    print::table(&["", ""], rows)
}

fn costs(bill: &Bill, chat: &Chat) -> String {
    let mut rows = Vec::new();
    for leg in &chat.usage.cost_details.providers {
        let name = bill.names.iter().find(|(key, _)| key.to_string() == leg.provider).map_or("?", |(_, name)| name);
        let rates = leg.msat_per_mtok;
        let tokens = leg.prompt_tokens.saturating_sub(leg.cached_tokens);
        for (what, tokens, rate) in [
            ("read", tokens, rates.input),
            ("read from cache", leg.cached_tokens, rates.cached_input),
            ("written", leg.completion_tokens, rates.output),
        ] {
            if tokens > 0 {
                rows.push(vec![name.to_owned(), what.to_owned(), right(tokens), right(rate), String::new()]);
            }
        }
        let kept = if leg.receipt_id.is_some() { "receipt" } else { "charged at the last acknowledgement" };
        rows.push(vec![name.to_owned(), kept.to_owned(), String::new(), String::new(), right(leg.cost_msat)]);
    }
    if bill.free_tokens > 0 {
        let what = "not yet acknowledged, so free".to_owned();
        rows.push(vec![String::new(), what, right(bill.free_tokens), String::new(), right(0)]);
    }
    let mut total = |what: &str, msat: i128| {
        rows.push(vec![what.to_owned(), String::new(), String::new(), String::new(), right(msat)]);
    };
    total("cost", chat.usage.cost_msat.into());
    total("paid in slices", bill.paid_msat.0.into());
    total("refunded at the end", bill.refunded_msat.0.into());
    if bill.owed_msat != 0 {
        total("owed, by a signed credit note", bill.owed_msat);
    }
    total("routing fees", chat.usage.cost_details.routing_fees_msat.into());
    print::table(&["", "", "         TOKENS", "      MSAT/MTOK", "           MSAT"], rows)
}

fn slices(bill: &Bill) -> String {
    let rows = bill.slices.iter().map(|row| {
        let k = row.k.map_or_else(|| "?".to_owned(), |k| k.to_string());
        vec![row.provider.to_owned(), k, right(row.slice.amount.0), right(row.slice.fee.0), row.slice.hash.to_string()]
    });
    print::table(&["TO", "K", "           MSAT", "            FEE", "PAYMENT HASH"], rows.collect())
}

fn receipts(bill: &Bill) -> String {
    let rows = bill.receipts.iter().map(|receipt| {
        let name = bill.names.get(&receipt.provider).copied().unwrap_or("?");
        let tokens = format!("{} in, {} out", receipt.prompt_tokens, receipt.completion_tokens);
        vec![name.to_owned(), tokens, right(receipt.cost.0), receipt.id.to_string()]
    });
    print::table(&["BY", "TOKENS", "           MSAT", "RECEIPT"], rows.collect())
}

fn wallets(bill: &Bill) -> String {
    let rows = bill.wallets.iter().map(|row| {
        let mut cells =
            vec![row.name.to_owned(), right(row.before_msat.0), right(row.out_msat.0), right(row.fees_msat.0)];
        cells.extend([right(row.in_msat.0), right(row.after_msat.0), right(row.ledger_msat)]);
        cells
    });
    let header = [
        "",
        "         BEFORE",
        "            OUT",
        "           FEES",
        "             IN",
        "          AFTER",
        "     LEDGER NET",
    ];
    print::table(&header, rows.collect())
}

fn exposures(bill: &Bill) -> String {
    let rows = bill.exposures.iter().map(|one| vec![one.name.to_owned(), right(one.largest_msat.0)]);
    print::table(&["", "           MSAT"], rows.collect())
}

fn audit(bill: &Bill) -> String {
    let rows = bill.verdicts.iter().map(|verdict| {
        let said = if verdict.clean { "clean".to_owned() } else { verdict.findings.join("\n") };
        vec![verdict.files.join(" + "), verdict.entries.to_string(), said]
    });
    print::table(&["FILES", "ENTRIES", "VERDICT"], rows.collect())
}

/// What does not hold comes last, where it is read.
fn checks(bill: &Bill) -> String {
    let mut sorted: Vec<_> = bill.checks.iter().collect();
    sorted.sort_by_key(|check| !check.holds);
    let rows = sorted.iter().map(|check| {
        let verdict = if check.holds { "ok" } else { "WRONG" };
        vec![verdict.to_owned(), check.what.clone(), check.detail.clone()]
    });
    print::table(&["", "", ""], rows.collect())
}

/// How to go on by hand, while everything is left running.
pub(super) fn try_it(market: &Market, for_sale: &ForSale) -> String {
    let (url, model) = (market.api_url(), &for_sale.name);
    format!(
        r#"
Everything is left running. It is a base model, so give it text to continue:

    curl -N {url}/chat/completions -H 'content-type: application/json' -d '{{"model": "{model}",
      "stream": true, "stream_options": {{"include_usage": true}}, "max_tokens": 64,
      "messages": [{{"role": "user", "content": "Once upon a time there was a node that"}}]}}'

    from openai import OpenAI            # pip install openai
    client = OpenAI(base_url="{url}", api_key="unused")
    stream = client.chat.completions.create(model="{model}", stream=True, max_tokens=64,
        messages=[{{"role": "user", "content": "Once upon a time there was a node that"}}])
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)

Wallets, ledgers and logs are below {dir}, for example:

    satgrid wallet balance --config {dir}/consumer.toml
    satgrid market list --config {dir}/consumer.toml
    satgrid ledger show --db {dir}/consumer/ledger.sqlite

Ctrl-C ends all of it.
"#,
        dir = market.dir.display(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_in_threes() {
        let check = |number: i64, expect: &str| assert_eq!(grouped(number), expect);
        check(0, "0");
        check(999, "999");
        check(1_000, "1,000");
        check(-1_234_567, "-1,234,567");
    }
}
