//! Stop strings in a text that arrives in pieces.

/// What became of a piece.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Matched {
    /// May be shown now.
    pub text: String,
    /// The text ends here, with a stop string.
    pub is_end: bool,
}

/// Finds the first stop string.
#[derive(Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
}

impl StopMatcher {
    /// A matcher at the start of a text.
    pub fn new(stops: &[String]) -> Self {
        Self { stops: stops.to_vec(), held: String::new() }
    }

    /// Takes a piece.
    pub fn push(&mut self, piece: &str) -> Matched {
        self.held.push_str(piece);
        let end = self.stops.iter().filter_map(|stop| self.held.find(stop).map(|at| at + stop.len())).min();
        if let Some(end) = end {
            return Matched { text: std::mem::take(&mut self.held)[..end].to_owned(), is_end: true };
        }
        let is_start = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        let keep = self.held.char_indices().map(|(at, _)| at).find(is_start).unwrap_or(self.held.len());
        let kept = self.held.split_off(keep);
        Matched { text: std::mem::replace(&mut self.held, kept), is_end: false }
    }

    /// What was held back.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}
