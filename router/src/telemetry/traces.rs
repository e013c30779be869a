//! Traces of requests, sent by OTLP over gRPC where an operator asks for it: one span for each request, within it one for
//! each phase. They are made when a request has ended, of times that are known then, so that they cost nothing before.

use std::fmt;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use opentelemetry::trace::{
    Span, SpanBuilder, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId, TraceState, Tracer,
    TracerProvider,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider};

/// Where traces go. Cheap to clone.
#[derive(Clone, Default)]
pub struct Traces(Option<Arc<Exporter>>);

struct Exporter {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl fmt::Debug for Traces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Traces").field(&self.0.is_some()).finish()
    }
}

/// What a trace tells of a request.
#[derive(Clone, Debug)]
pub struct RequestTrace<'a> {
    /// The route, as it is written in the code.
    pub route: &'static str,
    /// The request's header `traceparent`: who called, in whose trace.
    pub parent: Option<&'a str>,
    /// When it arrived.
    pub arrived: Instant,
    /// What followed, each until the next; the last until now.
    pub phases: &'a [(&'static str, Instant)],
    /// What else is known of it.
    pub attributes: Vec<KeyValue>,
    /// Why it failed, if it did.
    pub error: Option<String>,
}

impl Traces {
    /// Traces that are sent to an address, in the background. Called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// An address that is none.
    pub fn to(endpoint: &str, service_name: &str) -> Result<Self, String> {
        let exporter = SpanExporter::builder().with_tonic().with_endpoint(endpoint).build();
        let exporter = exporter.map_err(|error| format!("--otlp-endpoint {endpoint:?}: {error}"))?;
        let resource = Resource::builder_empty().with_service_name(service_name.to_owned()).build();
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::AlwaysOn)))
            .with_resource(resource)
            .build();
        let tracer = provider.tracer("text-generation-router");
        Ok(Self(Some(Arc::new(Exporter { provider, tracer }))))
    }

    /// Whether anything is sent.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Tells of a request that has ended.
    pub fn tell(&self, request: RequestTrace<'_>) {
        let Some(exporter) = &self.0 else { return };
        let tracer = &exporter.tracer;
        let (now, wall) = (Instant::now(), SystemTime::now());
        let when = |moment: Instant| wall.checked_sub(now.saturating_duration_since(moment)).unwrap_or(wall);
        let parent = request
            .parent
            .and_then(parent)
            .map_or_else(Context::new, |parent| Context::new().with_remote_span_context(parent));
        let root = SpanBuilder::from_name(request.route)
            .with_kind(SpanKind::Server)
            .with_start_time(when(request.arrived))
            .with_attributes(request.attributes);
        let mut root = tracer.build_with_context(root, &parent);
        if let Some(error) = request.error {
            root.set_status(Status::error(error));
        }
        let within = Context::new().with_remote_span_context(root.span_context().clone());
        for (n, (name, began)) in request.phases.iter().enumerate() {
            let ended = request.phases.get(n + 1).map_or(wall, |(_, next)| when(*next));
            let phase = SpanBuilder::from_name(*name).with_start_time(when(*began));
            tracer.build_with_context(phase, &within).end_with_timestamp(ended);
        }
        root.end_with_timestamp(wall);
    }

    /// Sends what has not been sent; waits for it, up to some seconds.
    pub fn flush(&self) {
        if let Some(exporter) = &self.0
            && let Err(error) = exporter.provider.shutdown()
        {
            tracing::warn!(%error, "the last traces could not be sent");
        }
    }
}

/// The span that a `traceparent` names (W3C Trace Context, version 00 and what follows it).
fn parent(header: &str) -> Option<SpanContext> {
    let mut parts = header.trim().split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let is_hex = |text: &str, length: usize| {
        text.len() == length && text.bytes().all(|byte| byte.is_ascii_hexdigit() && !byte.is_ascii_uppercase())
    };
    let is_fit = is_hex(version, 2) && version != "ff" && is_hex(trace, 32) && is_hex(span, 16) && is_hex(flags, 2);
    if !is_fit || version == "00" && parts.next().is_some() {
        return None;
    }
    let (trace, span) = (TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?);
    let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()? & 1);
    let context = SpanContext::new(trace, span, flags, true, TraceState::default());
    context.is_valid().then_some(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_is_what_the_w3c_says_it_is() {
        // Examples of the recommendation, and what it forbids.
        let context = parent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").unwrap();
        assert_eq!(context.trace_id().to_string(), "0af7651916cd43dd8448eb211c80319c");
        assert_eq!((context.span_id().to_string().as_str(), context.is_sampled()), ("b7ad6b7169203331", true));
        assert!(!parent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00").unwrap().is_sampled());
        assert!(parent("cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-what-the-future").is_some());
        for wrong in [
            "",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
        ] {
            assert!(parent(wrong).is_none(), "{wrong}");
        }
    }
}
