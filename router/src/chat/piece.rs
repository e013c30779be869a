//! What an answer is made of, as it is told to whoever reads it.

/// More of an answer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Piece {
    /// What the model thinks.
    Reasoning(String),
    /// What it says.
    Content(String),
    /// A call of a tool begins.
    Call {
        /// Counts the calls of the answer, from 0 on.
        index: usize,
        /// Of the tool.
        name: String,
    },
    /// More of a call's arguments: all of them, put together, are JSON if the model wrote JSON.
    Arguments {
        /// Of the call.
        index: usize,
        /// As the model wrote them.
        text: String,
    },
}
