//! Looking for a mark in a text that arrives in pieces.

/// Where a mark is in the text so far, or how much of the text's end may be the beginning of one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Found {
    /// It begins at this byte.
    At(usize),
    /// From this byte on the text may be its beginning; the text's length if not.
    MayBeginAt(usize),
}

/// Looks for `mark`, which is not empty.
pub(super) fn find(text: &str, mark: &str) -> Found {
    if let Some(at) = text.find(mark) {
        return Found::At(at);
    }
    let first = text.len().saturating_sub(mark.len());
    let starts = text.char_indices().map(|(at, _)| at).filter(|at| *at >= first);
    let begun = starts.into_iter().find(|at| mark.starts_with(&text[*at..]));
    Found::MayBeginAt(begun.unwrap_or(text.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_may_be_whole_begun_or_absent() {
        for (text, expected) in [
            ("a<b>c", Found::At(1)),
            ("a<b", Found::MayBeginAt(1)),
            ("é<", Found::MayBeginAt(2)),
            ("<c<b", Found::MayBeginAt(2)),
            ("abc", Found::MayBeginAt(3)),
        ] {
            assert_eq!(find(text, "<b>"), expected, "{text}");
        }
    }
}
