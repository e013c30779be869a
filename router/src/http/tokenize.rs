//! `/tokenize` and `/chat_tokenize`: what a prompt is made of.

use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
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

/// The tokens of a text, as the answer that `write` makes of them and the text. Both take long where the text is long.
async fn places<T: Serialize + 'static>(
    entry: &Entry,
    text: String,
    add_special: bool,
    write: fn(String, Vec<SimpleToken>) -> T,
) -> Result<Response, ApiError> {
    let size = text.len();
    let work = move |encoder: &dyn Encode| {
        let places = encoder.places(&text, add_special)?;
        let tokens = places.into_iter().map(|placed| simple(&text, placed)).collect();
        Ok::<_, ApiError>(serde_json::to_vec(&write(text, tokens)).expect("it is JSON"))
    };
    let answer = entry.state.pool.run(size, work).await??;
    Ok(([(header::CONTENT_TYPE, "application/json")], answer).into_response())
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
pub(super) async fn tokenize(entry: Entry, body: Body) -> Result<Response, ApiError> {
    entry.run(body, |entry, admitted| tokens_of(entry, admitted).boxed()).await
}

async fn tokens_of(entry: &Entry, admitted: &Admitted) -> Result<Response, ApiError> {
    let text = entry.read(admitted, |body, _| parse_tokenize(body)).await?;
    let _permit = entry.permits(1)?;
    places(entry, text, true, |_, tokens| tokens).await
}

/// Apply the chat template and tokenize what comes of it
#[utoipa::path(post, path = "/chat_tokenize", tag = super::docs::TAG, request_body = ChatRequest,
    responses((status = 200, description = "The prompt and its tokens", body = ChatTokenizeResponse),
        (status = 404, body = ErrorBody), (status = 422, body = ErrorBody), (status = 429, body = ErrorBody)))]
pub(super) async fn chat_tokenize(entry: Entry, body: Body) -> Result<Response, ApiError> {
    entry.run(body, |entry, admitted| tokens_of_chat(entry, admitted).boxed()).await
}

async fn tokens_of_chat(entry: &Entry, admitted: &Admitted) -> Result<Response, ApiError> {
    let request = entry.read(admitted, chat::parse).await?;
    let _permit = entry.permits(1)?;
    let (text, _) = entry.render(request.prompting, &request.options, admitted).await?;
    let answer = |templated_text, tokenize_response| ChatTokenizeResponse { tokenize_response, templated_text };
    places(entry, text, false, answer).await
}
