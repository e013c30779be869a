//! `/tokenize` and `/chat_tokenize`: what a prompt is made of.

use axum::Json;
use axum::body::Body;
use futures::FutureExt;
use serde::Serialize;
use utoipa::ToSchema;

use super::entry::{Admitted, Entry};
use super::error::{ApiError, ErrorBody};
use crate::request::chat::{self, ChatRequest};
use crate::request::native::GenerateRequest;
use crate::request::small::parse_tokenize;
use crate::text::tokenizer::{Encode, Placed};

/// A token and where it stands in the text, in bytes.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct SimpleToken {
    id: u32,
    /// Empty for what was added to the text.
    text: String,
    start: usize,
    stop: usize,
}

/// The tokens of a text, and the text.
async fn places(entry: &Entry, text: String, add_special: bool) -> Result<(String, Vec<SimpleToken>), ApiError> {
    let size = text.len();
    let work = move |encoder: &dyn Encode| encoder.places(&text, add_special).map(|places| (text, places));
    let (text, places) = entry.state.pool.run(size, work).await??;
    let tokens = places.into_iter().map(|placed| simple(&text, placed)).collect();
    Ok((text, tokens))
}

fn simple(text: &str, placed: Placed) -> SimpleToken {
    let Placed { id, bytes } = placed;
    SimpleToken { id, text: text.get(bytes.clone()).unwrap_or_default().into(), start: bytes.start, stop: bytes.end }
}

/// A chat's prompt.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ChatTokenizeResponse {
    tokenize_response: Vec<SimpleToken>,
    templated_text: String,
}

/// Tokenize a prompt
#[utoipa::path(post, path = "/tokenize", tag = super::docs::TAG, request_body = GenerateRequest,
    responses((status = 200, description = "Its tokens", body = Vec<SimpleToken>), (status = 422, body = ErrorBody),
        (status = 429, body = ErrorBody)))]
pub(super) async fn tokenize(entry: Entry, body: Body) -> Result<Json<Vec<SimpleToken>>, ApiError> {
    entry.run(body, |entry, admitted| tokens_of(entry, admitted).boxed()).await
}

async fn tokens_of(entry: &Entry, admitted: &Admitted) -> Result<Json<Vec<SimpleToken>>, ApiError> {
    let text = parse_tokenize(&admitted.body)?;
    let _permit = entry.permits(1)?;
    Ok(Json(places(entry, text, true).await?.1))
}

/// Apply the chat template and tokenize what comes of it
#[utoipa::path(post, path = "/chat_tokenize", tag = super::docs::TAG, request_body = ChatRequest,
    responses((status = 200, description = "The prompt and its tokens", body = ChatTokenizeResponse),
        (status = 422, body = ErrorBody), (status = 429, body = ErrorBody)))]
pub(super) async fn chat_tokenize(entry: Entry, body: Body) -> Result<Json<ChatTokenizeResponse>, ApiError> {
    entry.run(body, |entry, admitted| tokens_of_chat(entry, admitted).boxed()).await
}

async fn tokens_of_chat(entry: &Entry, admitted: &Admitted) -> Result<Json<ChatTokenizeResponse>, ApiError> {
    let request = chat::parse(&admitted.body, &admitted.limits)?;
    let _permit = entry.permits(1)?;
    let (text, _) = entry.render(request.prompting, &request.options, &admitted.limits).await?;
    let (text, tokens) = places(entry, text, false).await?;
    Ok(Json(ChatTokenizeResponse { tokenize_response: tokens, templated_text: text }))
}
