//! The one map from what went wrong to a status and a JSON body.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::chat::RenderError;
use crate::engine::GenerateError;
use crate::grammar::GrammarError;
use crate::request::Refused;
use crate::request::form::Grammar;
use crate::text::tokenizer::TokenizerError;

/// Seconds after which a client may try again.
const RETRY_AFTER_S: u32 = 1;

/// Characters of an error's text.
const MAX_TEXT: usize = 300;

/// The body of every rejection, and the error event of a stream.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = ErrorResponse)]
pub struct ErrorBody {
    /// What went wrong, in words.
    pub error: String,
    /// One of a fixed list of kinds.
    pub error_type: &'static str,
}

/// The body of a rejection by one of the `OpenAI` routes, and the error event of their streams.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct OpenAiErrorBody {
    error: OpenAiError,
    /// As on the other routes.
    error_type: &'static str,
}

/// What went wrong, as `OpenAI` tells it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct OpenAiError {
    message: String,
    r#type: &'static str,
    /// The field that it is about, where it is about one.
    param: Option<String>,
    code: Option<&'static str>,
}

/// A rejection.
#[derive(Clone, Debug)]
pub struct ApiError {
    status: StatusCode,
    body: ErrorBody,
    /// Why `tgi_request_failure` counts it; `None`: as its status says.
    reason: Option<&'static str>,
    /// The connection is not fit for another request.
    closes: bool,
    /// The body is told as `OpenAI` does, whatever the route.
    speaks_openai: bool,
}

impl ApiError {
    /// A rejection that no request for tokens has caused.
    pub fn new(status: StatusCode, error_type: &'static str, error: impl Into<String>) -> Self {
        let mut error = error.into();
        if let Some((end, _)) = error.char_indices().nth(MAX_TEXT) {
            error.truncate(end);
        }
        Self { status, body: ErrorBody { error, error_type }, reason: None, closes: false, speaks_openai: false }
    }

    /// The same, as the last answer on its connection.
    pub fn closing(mut self) -> Self {
        self.closes = true;
        self
    }

    /// The same, told as `OpenAI` does.
    pub fn for_openai(mut self) -> Self {
        self.speaks_openai = true;
        self
    }

    /// The body as `OpenAI` tells it.
    pub fn openai_body(&self) -> OpenAiErrorBody {
        let ErrorBody { error, error_type } = self.body.clone();
        let (r#type, code) = match self.status {
            StatusCode::UNAUTHORIZED => ("invalid_request_error", Some("invalid_api_key")),
            StatusCode::NOT_FOUND if error_type == "model_not_found" => ("invalid_request_error", Some(error_type)),
            StatusCode::TOO_MANY_REQUESTS => ("rate_limit_error", Some("rate_limit_exceeded")),
            status if status.is_client_error() && status != StatusCode::FAILED_DEPENDENCY => {
                ("invalid_request_error", None)
            }
            _ => ("server_error", None),
        };
        // An error about a field names it first, save for those that are worded as TGI's.
        let param = match error_type {
            "suffix not supported" => Some("suffix"),
            "batch size exceeded" => Some("prompt"),
            "model_not_found" => Some("model"),
            _ if self.status == StatusCode::UNPROCESSABLE_ENTITY => error.split('`').nth(1),
            _ => None,
        };
        let param = param.map(str::to_owned);
        OpenAiErrorBody { error: OpenAiError { message: error, r#type, param, code }, error_type }
    }

    /// No key, or one that is not known.
    pub fn unauthorized() -> Self {
        let text = "expected the header `Authorization: Bearer KEY` with a key of this server";
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", text)
    }

    /// A head that is no HTTP, or too much of it.
    pub fn unreadable(status: StatusCode) -> Self {
        let (error_type, error) = match status {
            StatusCode::URI_TOO_LONG => ("uri_too_long", "the path is too long"),
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => {
                ("headers_too_large", "the headers are more than 100, or longer than 65536 bytes")
            }
            _ => ("bad_request", "the request is not valid HTTP"),
        };
        Self::new(status, error_type, error).closing()
    }

    /// A client took too long to send something.
    pub fn late(what: &str, deadline: Duration) -> Self {
        let text = format!("the {what} did not arrive within {} s", deadline.as_secs_f32());
        Self::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", text).closing()
    }

    /// A body in a form that is not read.
    pub fn unsupported(error: impl Into<String>) -> Self {
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", error)
    }

    /// A handler panicked, or a part of it.
    pub fn internal(error: &'static str) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", error)
    }

    /// The same, counted for this reason.
    pub fn counted(mut self, reason: &'static str) -> Self {
        self.reason = Some(reason);
        self
    }

    /// The model is not loaded yet, or its shards are being replaced.
    pub fn unhealthy() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "healthcheck", "unhealthy")
    }

    /// No shard has ever been ready: nothing is known about the model.
    pub fn not_ready() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", "the model is not loaded yet").counted("overloaded")
    }

    /// The server ends.
    pub fn draining() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", "the server is shutting down")
            .counted("overloaded")
            .closing()
    }

    /// The driver has ended a stream without a last token.
    pub fn incomplete() -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "incomplete_generation", "Incomplete generation")
            .counted("incomplete")
    }

    /// The same in a stream, whose status is sent.
    pub fn incomplete_stream() -> Self {
        let status = StatusCode::INTERNAL_SERVER_ERROR;
        Self::new(status, "incomplete_generation_stream", "Incomplete generation stream").counted("incomplete")
    }

    /// Why `tgi_request_failure` counts a request for tokens that ended so: every one of them is counted.
    pub fn reason(&self) -> &'static str {
        self.reason.unwrap_or(if self.status.is_client_error() { "validation" } else { "internal" })
    }

    /// The status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The body, for an event of a stream whose status is sent.
    pub fn body(&self) -> &ErrorBody {
        &self.body
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        let (status, error_type) = match refused {
            Refused::Malformed(_) => (StatusCode::BAD_REQUEST, "validation"),
            Refused::Invalid(_) => (StatusCode::UNPROCESSABLE_ENTITY, "validation"),
            Refused::Tool(_) => (StatusCode::UNPROCESSABLE_ENTITY, "tool_error"),
            Refused::UnknownModel(_) => (StatusCode::NOT_FOUND, "model_not_found"),
            Refused::Suffix => (StatusCode::UNPROCESSABLE_ENTITY, "suffix not supported"),
            Refused::BatchSize(_) => (StatusCode::UNPROCESSABLE_ENTITY, "batch size exceeded"),
            Refused::Other { error_type, .. } => (StatusCode::UNPROCESSABLE_ENTITY, error_type),
        };
        Self::new(status, error_type, refused.to_string()).counted("validation")
    }
}

impl From<RenderError> for ApiError {
    fn from(error: RenderError) -> Self {
        let status = StatusCode::UNPROCESSABLE_ENTITY;
        Self::new(status, "template_error", format!("Template error: {error}")).counted("template")
    }
}

impl ApiError {
    /// A grammar that is not taken, or not now.
    pub fn of_grammar(grammar: &Grammar, error: &GrammarError) -> Self {
        match error {
            GrammarError::Refused(cause) => Self::from(grammar.refused(cause)),
            GrammarError::Busy => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, "overloaded", error.to_string()).counted("overloaded")
            }
            GrammarError::Ended => Self::internal("the check of grammars has ended").counted("validation"),
        }
    }
}

impl From<TokenizerError> for ApiError {
    fn from(error: TokenizerError) -> Self {
        match error {
            TokenizerError::Text => Self::from(Refused::Invalid(error.to_string())),
            TokenizerError::Ended => Self::draining(),
            TokenizerError::Panicked | TokenizerError::File { .. } => {
                Self::internal("the tokenizer failed on this text").counted("validation")
            }
        }
    }
}

impl From<GenerateError> for ApiError {
    fn from(error: GenerateError) -> Self {
        let generation = |text: String| {
            let error = format!("Request failed during generation: {text}");
            Self::new(StatusCode::FAILED_DEPENDENCY, "generation", error).counted("generation")
        };
        match error {
            GenerateError::Overloaded | GenerateError::QueueTimeout { .. } => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, "overloaded", error.to_string()).counted("overloaded")
            }
            GenerateError::ShuttingDown { reason } => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", reason).counted("generation").closing()
            }
            GenerateError::TooLong { .. } => Self::from(Refused::Invalid(error.to_string())),
            GenerateError::Row { kind: "numerical", message } => Self {
                body: ErrorBody { error_type: "numerical", ..generation(message).body },
                ..generation(String::new())
            }
            .counted("numerical"),
            GenerateError::Row { kind: _, message } => Self::from(Refused::Invalid(message)),
            GenerateError::KilledShards | GenerateError::Stalled => generation(error.to_string()),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = if self.speaks_openai {
            (self.status, Json(self.openai_body())).into_response()
        } else {
            (self.status, Json(&self.body)).into_response()
        };
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if self.status == StatusCode::TOO_MANY_REQUESTS {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER_S));
        }
        if self.closes {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response.extensions_mut().insert(self);
        response
    }
}
