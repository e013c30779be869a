//! Stop strings in a text that arrives in pieces. What could be the beginning of one is held back.

/// What became of a piece.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Matched {
    /// Text that may be shown now.
    pub text: String,
    /// The text ends here, with a stop string.
    pub is_end: bool,
}

/// Finds the stop string that ends first, wherever in a token it does.
#[derive(Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// The text ends before the stop string, not behind it.
    cuts: bool,
    /// The longest end of the text so far that is the beginning of a stop string.
    held: String,
}

impl StopMatcher {
    /// A matcher at the start of a text. Empty stop strings are refused before. Whether it `cuts`: the stop string stays in
    /// the answers of TGI's own routes and not in those of the OpenAI routes.
    pub fn new(stops: &[String], cuts: bool) -> Self {
        Self { stops: stops.to_vec(), cuts, held: String::new() }
    }

    /// Takes a piece of the text. Nothing follows once it `is_end`.
    pub fn push(&mut self, piece: &str) -> Matched {
        self.held.push_str(piece);
        let places = self.stops.iter().filter_map(|stop| self.held.find(stop).map(|at| (at + stop.len(), at)));
        if let Some((end, start)) = places.min() {
            let mut text = std::mem::take(&mut self.held);
            text.truncate(if self.cuts { start } else { end });
            return Matched { text, is_end: true };
        }
        let may_begin = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        // Only an end shorter than the longest stop string can be its beginning.
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let first = self.held.len().saturating_sub(longest);
        let mut starts = self.held.char_indices().map(|(at, _)| at).skip_while(|at| *at < first);
        let keep = starts.find(may_begin).unwrap_or(self.held.len());
        let kept = self.held.split_off(keep);
        Matched { text: std::mem::replace(&mut self.held, kept), is_end: false }
    }

    /// What was held back, at the end of a text without a stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    /// The text up to the end of the stop string that ends first, by trying every end of the whole text.
    fn naive<'a>(text: &'a str, stops: &[String]) -> &'a str {
        let ends = text.char_indices().map(|(at, c)| at + c.len_utf8());
        ends.map(|end| &text[..end]).find(|begun| stops.iter().any(|stop| begun.ends_with(stop))).unwrap_or(text)
    }

    fn stream(text: &str, stops: &[String], mut cut: impl FnMut() -> bool) -> (String, bool) {
        let (mut matcher, mut shown, mut piece) = (StopMatcher::new(stops, false), String::new(), String::new());
        for c in text.chars() {
            piece.push(c);
            if cut() {
                let matched = matcher.push(&std::mem::take(&mut piece));
                shown.push_str(&matched.text);
                if matched.is_end {
                    return (shown, true);
                }
            }
        }
        let matched = matcher.push(&piece);
        shown.push_str(&matched.text);
        if !matched.is_end {
            shown.push_str(&matcher.finish());
        }
        (shown, matched.is_end)
    }

    #[test]
    fn any_text_in_any_pieces_ends_where_a_search_of_the_whole_says() {
        let alphabet = ['a', 'b', 'é', '🙂'];
        for seed in 0..3000 {
            let mut rng = StdRng::seed_from_u64(seed);
            let word = |rng: &mut StdRng, most: usize| -> String {
                (0..rng.random_range(1..=most)).map(|_| alphabet[rng.random_range(0..4)]).collect()
            };
            let stops: Vec<String> = (0..rng.random_range(1..4)).map(|_| word(&mut rng, 4)).collect();
            let text = word(&mut rng, 30);
            let expected = naive(&text, &stops);
            let (shown, is_end) = stream(&text, &stops, || rng.random_bool(0.5));
            assert_eq!(shown, expected, "seed {seed}: {text:?} {stops:?}");
            assert_eq!(is_end, stops.iter().any(|stop| expected.ends_with(stop.as_str())));
        }
    }

    #[test]
    fn what_may_begin_a_stop_string_is_held_back_and_released() {
        let mut matcher = StopMatcher::new(&["éx".into()], false);
        assert_eq!(matcher.push("é"), Matched::default());
        assert_eq!(matcher.push("y"), Matched { text: "éy".into(), is_end: false });
        assert_eq!(matcher.push("é"), Matched::default());
        assert_eq!(matcher.push("xz"), Matched { text: "éx".into(), is_end: true });
    }

    #[test]
    fn a_stop_string_may_be_cut_off_and_no_part_of_it_is_shown() {
        let mut matcher = StopMatcher::new(&["b".into(), "abc".into(), "ab".into()], true);
        assert_eq!(matcher.push("xa"), Matched { text: "x".into(), is_end: false });
        assert_eq!(matcher.push("bc"), Matched { text: String::new(), is_end: true });
    }
}
