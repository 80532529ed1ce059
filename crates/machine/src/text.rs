//! Text of a guest, a registry or a file, sanitized for display on a terminal.

/// `text` on one line, without characters that control a terminal, reorder the text around them or
/// show nothing: white space that is a control character becomes a space, others U+FFFD. As many
/// characters as before.
pub fn printable(text: &str) -> String {
    text.chars().map(visible).collect()
}

fn visible(c: char) -> char {
    match c {
        '\t'..='\r' | '\u{85}' | '\u{2028}' | '\u{2029}' => ' ',
        c if c.is_control() || is_ignorable(c) => char::REPLACEMENT_CHARACTER,
        c => c,
    }
}

/// Unicode's Default_Ignorable_Code_Point, which contains all bidirectional controls, and the
/// annotations and format characters outside it.
fn is_ignorable(c: char) -> bool {
    matches!(
        c,
        '\u{ad}'
            | '\u{34f}'
            | '\u{600}'..='\u{605}'
            | '\u{61c}'
            | '\u{6dd}'
            | '\u{70f}'
            | '\u{890}'..='\u{891}'
            | '\u{8e2}'
            | '\u{115f}'..='\u{1160}'
            | '\u{17b4}'..='\u{17b5}'
            | '\u{180b}'..='\u{180f}'
            | '\u{200b}'..='\u{200f}'
            | '\u{202a}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{3164}'
            | '\u{fe00}'..='\u{fe0f}'
            | '\u{feff}'
            | '\u{ffa0}'
            | '\u{fff0}'..='\u{fffb}'
            | '\u{110bd}'
            | '\u{110cd}'
            | '\u{13430}'..='\u{1343f}'
            | '\u{1bca0}'..='\u{1bca3}'
            | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0000}'..='\u{e0fff}'
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_hides_reorders_or_controls() {
        let c1 = '\u{80}'..='\u{9f}';
        let bidirectional = ('\u{202a}'..='\u{202e}').chain('\u{2066}'..='\u{2069}');
        let others = [
            '\0',
            '\x07',
            '\x1b',
            '\x7f',
            '\u{ad}',
            '\u{61c}',
            '\u{200b}',
            '\u{200d}',
            '\u{200e}',
            '\u{2060}',
            '\u{2063}',
            '\u{3164}',
            '\u{fe0f}',
            '\u{feff}',
            '\u{fff9}',
            '\u{e0041}',
        ];
        for hidden in c1.chain(bidirectional).chain(others) {
            let expected = match hidden {
                '\u{85}' => "a b",
                _ => "a\u{fffd}b",
            };
            let code = u32::from(hidden);
            assert_eq!(printable(&format!("a{hidden}b")), expected, "U+{code:04X}");
        }
    }

    #[test]
    fn text_stays_as_it_is_but_on_one_line() {
        assert_eq!(printable("a\tb\r\nc\u{2028}d"), "a b  c d");
        for text in ["plain", "Größe 5 µs…", "名前", "שלום", "🦀", "e\u{301}"] {
            assert_eq!(printable(text), text);
        }
    }
}
