//! Medians, and the table that is printed.

use crate::machine::Machine;
use std::fmt::Write;
use std::time::Duration;

/// The middle of the values; the mean of the two in the middle.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// What a figure is to be.
#[derive(Clone, Copy)]
pub(crate) enum Goal {
    AtLeast(f64),
    AtMost(f64),
    /// Shown beside the others.
    None,
}

struct Row {
    what: String,
    /// The figure and its baseline, as measured.
    measured: String,
    result: String,
    goal: Goal,
    value: f64,
}

#[derive(Default)]
pub(crate) struct Report {
    rows: Vec<Row>,
    notes: Vec<String>,
}

impl Report {
    /// `turns` holds a figure and its baseline, measured right after one another: the median of their ratios counts.
    pub(crate) fn ratio(&mut self, what: &str, unit: &str, turns: &[(f64, f64)], goal: Goal) {
        let ratios: Vec<f64> = turns.iter().map(|(figure, baseline)| figure / baseline).collect();
        let figures: Vec<f64> = turns.iter().map(|turn| turn.0).collect();
        let baselines: Vec<f64> = turns.iter().map(|turn| turn.1).collect();
        let measured = format!("{:.1} : {:.1} {unit}", median(&figures), median(&baselines));
        let value = median(&ratios);
        let spread = ratios.iter().fold((f64::MAX, f64::MIN), |(low, high), r| (low.min(*r), high.max(*r)));
        let result = format!("{value:.3} ({:.3} to {:.3})", spread.0, spread.1);
        self.rows.push(Row { what: what.into(), measured, result, goal, value });
    }

    pub(crate) fn figure(&mut self, what: &str, unit: &str, value: f64, goal: Goal) {
        let result = format!("{value:.1} {unit}");
        self.rows.push(Row { what: what.into(), measured: String::new(), result, goal, value });
    }

    /// Says what else the reader should know; shown at once and below the table.
    pub(crate) fn note(&mut self, text: String) {
        eprintln!("{text}");
        self.notes.push(text);
    }

    pub(crate) fn print(&self, before: &Machine, after: &Machine, took: Duration) {
        let mut text =
            String::from("\nRATIOS FROM ONE RUN (medians of alternating turns; smallest and largest in brackets)\n\n");
        let head = ["what", "measured : baseline", "ratio or figure", "goal", ""].map(str::to_owned);
        let rows = self.rows.iter().map(|row| {
            let (goal, met) = match row.goal {
                Goal::AtLeast(least) => (format!(">= {least}"), Some(row.value >= least)),
                Goal::AtMost(most) => (format!("<= {most}"), Some(row.value <= most)),
                Goal::None => (String::new(), None),
            };
            let mark = met.map_or("", |met| if met { "met" } else { "MISSED" });
            [row.what.clone(), row.measured.clone(), row.result.clone(), goal, mark.to_owned()]
        });
        let table: Vec<[String; 5]> = std::iter::once(head).chain(rows).collect();
        let width = |column: usize| table.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..5).map(width).collect();
        for row in &table {
            let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            let _ = writeln!(text, "{}", cells.join("  ").trim_end());
        }
        text.push('\n');
        for note in &self.notes {
            let _ = writeln!(text, "{note}");
        }
        let _ = writeln!(text, "machine before: {before}\nmachine after:  {after}\ntook {} s", took.as_secs());
        println!("{text}");
    }
}
