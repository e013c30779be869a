//! Chats as text and back: the model's template turns messages into a prompt; parsers find reasoning and tool calls in
//! what the model writes. Knows neither HTTP nor tokens' ids.

pub mod answer;
pub mod files;
mod held;
mod piece;
pub mod prompt;
mod python;
pub mod reasoning;
mod scanner;
pub mod template;
pub mod tools;

pub use template::{ChatTemplate, RenderError, TemplateError};
