//! QR codes in half blocks: two modules a letter, dark on light in any terminal.

use qrcode::{Color, EcLevel, QrCode};

/// Light modules around the code, so that a camera finds its edge.
const QUIET: usize = 2;

/// The code as lines of text; `None` where the text is too long for one.
pub(super) fn lines(text: &str) -> Option<String> {
    let code = QrCode::with_error_correction_level(text.as_bytes(), EcLevel::L).ok()?;
    let (width, colors) = (code.width(), code.to_colors());
    let dark = |x: usize, y: usize| {
        let inside = (QUIET..QUIET + width).contains(&x) && (QUIET..QUIET + width).contains(&y);
        inside && colors[(y - QUIET) * width + (x - QUIET)] == Color::Dark
    };
    let side = width + 2 * QUIET;
    let mut out = String::new();
    for y in (0..side).step_by(2) {
        for x in 0..side {
            // Light is drawn, dark is left: right on a dark terminal, and readable inverted on a light one.
            out.push(match (dark(x, y), y + 1 >= side || dark(x, y + 1)) {
                (false, false) => '█',
                (false, true) => '▀',
                (true, false) => '▄',
                (true, true) => ' ',
            });
        }
        out.push('\n');
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_square_and_has_its_three_finders() {
        let text = lines("LNBCRT1").unwrap();
        let rows: Vec<Vec<char>> = text.lines().map(|line| line.chars().collect()).collect();
        let side = rows[0].len();
        assert_eq!(side, 21 + 2 * QUIET, "version 1 has 21 modules");
        assert_eq!(rows.len(), side.div_ceil(2));
        // The finder's top edge is seven dark modules under a light quiet zone of two rows.
        assert!(rows[0].iter().all(|c| *c == '█'));
        let top: String = rows[1][QUIET..QUIET + 7].iter().collect();
        assert_eq!(top, " ▄▄▄▄▄ ");
        assert!(lines(&"x".repeat(5_000)).is_none());
    }
}
