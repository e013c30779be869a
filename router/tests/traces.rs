//! Traces reach a collector that speaks OTLP.

#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use opentelemetry::KeyValue;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use text_generation_router::telemetry::traces::{RequestTrace, Traces};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

struct Collector(mpsc::Sender<ExportTraceServiceRequest>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let _ = self.0.send(request.into_inner()).await;
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_is_a_span_in_the_callers_trace_with_a_span_for_each_phase() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, mut received) = mpsc::channel(8);
    let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(Collector(sender)));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));

    let traces = Traces::to(&format!("http://{address}"), "mine").unwrap();
    let now = Instant::now();
    let arrived = now.checked_sub(Duration::from_secs(3)).unwrap();
    let phases = [("queue", now.checked_sub(Duration::from_secs(2)).unwrap()), ("inference", now)];
    traces.tell(RequestTrace {
        route: "/generate",
        parent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        arrived,
        phases: &phases,
        attributes: vec![KeyValue::new("request.id", "7")],
        error: None,
    });
    tokio::task::spawn_blocking(move || traces.flush()).await.unwrap();
    let sent = tokio::time::timeout(Duration::from_secs(20), received.recv()).await.unwrap().unwrap();
    let resource = &sent.resource_spans[0];
    let name = &resource.resource.as_ref().unwrap().attributes[0];
    assert_eq!(name.key, "service.name");
    let spans = &resource.scope_spans[0].spans;
    let by_name = |name: &str| spans.iter().find(|span| span.name == name).unwrap();
    let (root, queue) = (by_name("/generate"), by_name("queue"));
    assert_eq!(spans.len(), 3);
    let trace = [0x0a, 0xf7, 0x65, 0x19, 0x16, 0xcd, 0x43, 0xdd, 0x84, 0x48, 0xeb, 0x21, 0x1c, 0x80, 0x31, 0x9c];
    assert!(spans.iter().all(|span| span.trace_id == trace));
    assert_eq!(root.parent_span_id, [0xb7, 0xad, 0x6b, 0x71, 0x69, 0x20, 0x33, 0x31]);
    assert_eq!(queue.parent_span_id, root.span_id);
    let seconds = (queue.end_time_unix_nano - queue.start_time_unix_nano) as f64 / 1e9;
    assert!((1.9..2.1).contains(&seconds), "{seconds}");
    assert!(root.start_time_unix_nano < queue.start_time_unix_nano);
}

#[tokio::test]
async fn an_address_that_is_none_is_refused() {
    let error = Traces::to("no address", "mine").unwrap_err();
    assert!(error.contains("--otlp-endpoint \"no address\""), "{error}");
}
