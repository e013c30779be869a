//! Keys, the small routes, and the description of all of them.

#![allow(clippy::unwrap_used)]

mod http_common;

use std::collections::BTreeSet;

use http_common::*;
use serde_json::{Value, json};
use text_generation_router::engine::{FinishReason, PromptToken};
use text_generation_router::http::Config;
use text_generation_router::http::auth::ApiKeys;

fn asked(address: std::net::SocketAddr, path: &'static str, body: impl ToString) -> tokio::task::JoinHandle<Answer> {
    let body = body.to_string();
    tokio::spawn(async move { ask(address, &post(path, body)).await })
}

async fn document(address: std::net::SocketAddr) -> Value {
    ask(address, &get("/api-doc/openapi.json")).await.json()
}

#[tokio::test]
async fn every_route_but_the_probes_asks_for_a_key() {
    let open = start().await;
    let document = document(open.address).await;
    let keys = ApiKeys::new(["secret".into(), "other".into()]);
    let server = serve(Config { api_keys: keys, ..config() }, ready(), tokenizer()).await;
    let probes = ["/health", "/ping", "/livez", "/readyz", "/startupz"];
    let mut num_routes = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        let path = path.replace(['{', '}'], "");
        for method in methods.as_object().unwrap().keys().filter(|method| ["get", "post"].contains(&method.as_str())) {
            let request = |key: Option<&str>| {
                let value = format!("Bearer {}", key.unwrap_or_default());
                let mut headers =
                    vec![("Connection", "close"), ("Content-Type", "application/json"), ("Content-Length", "0")];
                headers.extend(key.map(|_| ("Authorization", value.as_str())));
                head(&method.to_uppercase(), &path, &headers).into_bytes()
            };
            let with = ask(server.address, &request(Some("secret"))).await;
            assert_ne!(with.status, 401, "{method} {path}");
            for key in [None, Some("Secret"), Some("")] {
                let without = ask(server.address, &request(key)).await;
                if probes.contains(&path.as_str()) {
                    assert_eq!(without.status, 200, "{method} {path}");
                    continue;
                }
                assert_eq!(without.headers["www-authenticate"], "Bearer");
                if path.starts_with("/v1/") {
                    let error = without.check_openai_error(401, "unauthorized");
                    assert_eq!(error["code"], "invalid_api_key");
                } else {
                    without.check_error(401, "unauthorized");
                }
                assert!(!without.body.contains("ecret"));
            }
            num_routes += 1;
        }
    }
    assert!(num_routes >= 25, "{num_routes} routes");
    ask(server.address, &get("/nope")).await.check_error(401, "unauthorized");
}

#[tokio::test]
async fn each_key_has_a_part_of_the_prefix_cache_of_its_own() {
    let keys = ApiKeys::new(["a".into(), "b".into()]);
    let mut server = serve(Config { api_keys: keys, ..config() }, ready(), tokenizer()).await;
    let mut namespaces = vec![];
    for key in ["a", "b", "a"] {
        let body = r#"{"inputs":"x"}"#;
        let (length, key) = (body.len().to_string(), format!("Bearer {key}"));
        let headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", &length),
            ("Authorization", &key),
            ("Connection", "close"),
        ];
        let request = [head("POST", "/generate", &headers).as_bytes(), body.as_bytes()].concat();
        let address = server.address;
        let answered = tokio::spawn(async move { ask(address, &request).await });
        let submission = server.submission().await;
        namespaces.push(submission.request.namespace);
        answer(submission, outputs(&["y"], FinishReason::EosToken)).await;
        assert_eq!(answered.await.unwrap().status, 200);
    }
    assert_eq!(namespaces[0], namespaces[2]);
    assert!(namespaces[0] != namespaces[1] && namespaces.iter().all(|namespace| *namespace != 0));
}

#[tokio::test]
async fn requests_keep_the_names_that_clients_give_them() {
    let server = start().await;
    let named = head("GET", "/health", &[("X-Request-Id", "mine-1"), ("Connection", "close")]);
    assert_eq!(ask(server.address, named.as_bytes()).await.headers["x-request-id"], "mine-1");
    let refused = head("GET", "/nope", &[("X-Request-Id", "mine-2"), ("Connection", "close")]);
    assert_eq!(ask(server.address, refused.as_bytes()).await.headers["x-request-id"], "mine-2");
    let long = "x".repeat(129);
    let unfit = head("GET", "/health", &[("X-Request-Id", &long), ("Connection", "close")]);
    let given = ask(server.address, unfit.as_bytes()).await.headers["x-request-id"].clone();
    assert!(!given.is_empty() && given != long);
}

#[tokio::test]
async fn a_text_is_tokenized_with_the_places_of_its_tokens() {
    let server = start().await;
    let text = "Grüße 🙂!";
    let tokens = ask(server.address, &post("/tokenize", json!({"inputs": text}).to_string())).await.json();
    let ids: Vec<_> = tokens.as_array().unwrap().iter().map(|token| token["id"].as_u64().unwrap() as u32).collect();
    assert_eq!(ids, tokenizer().encode(text, true).unwrap());
    assert_eq!(
        (&tokens[0]["text"], &tokens[0]["start"], &tokens[0]["stop"]),
        (&json!(""), &json!(0), &json!(0)),
        "added"
    );
    for token in tokens.as_array().unwrap() {
        let place = token["start"].as_u64().unwrap() as usize..token["stop"].as_u64().unwrap() as usize;
        assert_eq!(token["text"], text.get(place).unwrap_or_default());
    }
    ask(server.address, &post("/tokenize", r#"{"inputs":""}"#)).await.check_error(422, "validation");
    let permits: Vec<_> = (0..4).map(|_| server.engine.permit().unwrap()).collect();
    ask(server.address, &post("/tokenize", r#"{"inputs":"a"}"#)).await.check_error(429, "overloaded");
    drop(permits);
    let body = r#"{"messages":[{"role":"user","content":"Hi"}]}"#;
    let chat = ask(server.address, &post("/chat_tokenize", body)).await.json();
    assert_eq!(chat["templated_text"], "<|user|>Hi\n<|assistant|>");
    let ids: Vec<_> = chat["tokenize_response"].as_array().unwrap().iter().map(|token| token["id"].clone()).collect();
    assert_eq!(json!(ids), json!(tokenizer().encode("<|user|>Hi\n<|assistant|>", false).unwrap()));
    assert_eq!(server.engine.num_free_permits(), 4);
}

#[tokio::test]
async fn an_invocation_is_answered_as_the_route_that_it_is() {
    let mut server = start().await;
    for (body, field) in [
        (r#"{"inputs":"a"}"#, "/0/generated_text"),
        (r#"{"messages":[{"role":"user","content":"a"}]}"#, "/choices/0/message/content"),
        (r#"{"prompt":"a"}"#, "/choices/0/text"),
    ] {
        let answered = asked(server.address, "/invocations", body);
        answer(server.submission().await, outputs(&["x"], FinishReason::EosToken)).await;
        let json = answered.await.unwrap().json();
        assert!(json.pointer(field).unwrap().as_str().unwrap().ends_with('x'), "{json}");
    }
    ask(server.address, &post("/invocations", "{}")).await.check_error(422, "validation");
    let chat = r#"{"messages":[],"n":1}"#;
    ask(server.address, &post("/invocations", chat)).await.check_openai_error(422, "validation");
}

#[tokio::test]
async fn vertex_and_kserve_get_their_shapes() {
    let mut server = start().await;
    let body = json!({"instances": [{"inputs": "a", "parameters": {"max_new_tokens": 2}},
        {"messages": [{"role": "user", "content": "b"}], "max_tokens": 3}]});
    let answered = asked(server.address, "/vertex", body);
    for (text, most) in [("x", 2), ("y", 3)] {
        let submission = server.submission().await;
        assert!(submission.request.sampling.do_sample && submission.request.max_new_tokens == most);
        answer(submission, outputs(&[text], FinishReason::EosToken)).await;
    }
    assert_eq!(answered.await.unwrap().json(), json!({"predictions": ["x", "y"]}));
    let error = ask(server.address, &post("/vertex", r#"{"instances":[]}"#)).await;
    error.check_error(422, "Input validation error");

    let body = json!({"id": "7", "inputs": [{"name": "in", "shape": [1], "datatype": "BYTES", "data": [104, 105]}],
        "outputs": [{"name": "out"}], "parameters": {"max_new_tokens": 2}});
    let answered = asked(server.address, "/v2/models/m/versions/1/infer", body);
    let submission = server.submission().await;
    assert_eq!(submission.request.prompt_ids, tokenizer().encode("hi", true).unwrap());
    answer(submission, outputs(&["é"], FinishReason::EosToken)).await;
    let outputs = json!([{"name": "out", "shape": [1, 2], "datatype": "BYTES", "data": [195, 169]}]);
    assert_eq!(answered.await.unwrap().json(), json!({"id": "7", "outputs": outputs}));
    for path in ["/v2/health/live", "/v2/health/ready", "/v2/models/m/versions/1/ready"] {
        assert_eq!(ask(server.address, &get(path)).await.json(), json!({"live": true}), "{path}");
    }
    assert_eq!(ask(server.address, &get("/v2")).await.status, 200);
    assert_eq!(ask(server.address, &get("/v2/models/m/versions/1")).await.json()["name"], "m");
    server.status.send_modify(|status| status.is_ready = false);
    ask(server.address, &get("/v2/health/ready")).await.check_error(503, "healthcheck");
}

#[tokio::test]
async fn the_best_of_some_candidates_is_answered_with_the_others_beside_it() {
    let mut server = start().await;
    let body = json!({"inputs": "a", "parameters": {"best_of": 2, "do_sample": true, "details": true,
        "decoder_input_details": true, "top_n_tokens": 1}});
    let answered = asked(server.address, "/generate", body);
    for (branch, (text, logprob)) in [("bad", -3.0), ("good", -1.0)].into_iter().enumerate() {
        let submission = server.submission().await;
        assert_eq!(submission.request.sampling.branch, branch as u32);
        assert!(submission.request.wants_prompt_logprobs);
        let mut generated = outputs(&[text], FinishReason::EosToken);
        generated[0].token.logprob = logprob;
        let token = |id, logprob| PromptToken { id, text: "p".into(), logprob, top: vec![] };
        generated[0].prompt = Some(vec![token(1, None), token(5, Some(-0.25))]);
        answer(submission, generated).await;
    }
    let json = answered.await.unwrap().json();
    assert_eq!(json["generated_text"], "good");
    let details = &json["details"];
    assert_eq!(details["best_of_sequences"][0]["generated_text"], "bad");
    assert_eq!(details["best_of_sequences"][0]["tokens"][0]["logprob"], -3.0);
    assert_eq!(
        details["prefill"],
        json!([{"id": 1, "text": "p", "logprob": null}, {"id": 5, "text": "p", "logprob": -0.25}])
    );
    assert_eq!(details["top_tokens"][0][0]["id"], 500);
    assert!(details["seed"].is_u64());
}

#[tokio::test]
async fn a_browser_gets_a_page_that_loads_nothing_from_elsewhere() {
    let keys = ApiKeys::new(["secret".into()]);
    let server = serve(Config { api_keys: keys, ..config() }, ready(), tokenizer()).await;
    let browser = [("Accept", "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"), ("Connection", "close")];
    let page = ask(server.address, head("GET", "/", &browser).as_bytes()).await;
    assert!(page.status == 200 && page.headers["content-type"].starts_with("text/html"), "{:?}", page.headers);
    assert!(page.headers["content-security-policy"].contains("default-src 'none'"));
    assert!(!page.body.contains("http://") && !page.body.contains("https://"), "no address of another host");
    ask(server.address, &get("/")).await.check_error(401, "unauthorized");
    ask(server.address, head("GET", "/docs", &browser).as_bytes()).await.check_error(401, "unauthorized");
}

/// TGI's paths, and names of what its documents have, as far as this server has the same.
const TGI_PATHS: [&str; 11] = [
    "/",
    "/chat_tokenize",
    "/generate",
    "/generate_stream",
    "/health",
    "/info",
    "/invocations",
    "/metrics",
    "/tokenize",
    "/v1/chat/completions",
    "/v1/completions",
];
const TGI_SCHEMAS: [(&str, &str); 16] = [
    (
        "GenerateParameters",
        "adapter_id best_of decoder_input_details details do_sample frequency_penalty grammar \
      max_new_tokens repetition_penalty return_full_text seed stop temperature top_k top_n_tokens top_p truncate \
      typical_p watermark",
    ),
    ("GenerateRequest", "inputs parameters"),
    ("CompatGenerateRequest", "inputs parameters stream"),
    ("GenerateResponse", "details generated_text"),
    ("Details", "best_of_sequences finish_reason generated_tokens prefill seed tokens top_tokens"),
    ("BestOfSequence", "finish_reason generated_text generated_tokens prefill seed tokens top_tokens"),
    ("StreamResponse", "details generated_text index token top_tokens"),
    ("StreamDetails", "finish_reason generated_tokens input_length seed"),
    ("Token", "id logprob special text"),
    ("PrefillToken", "id logprob text"),
    ("SimpleToken", "id start stop text"),
    ("ErrorResponse", "error error_type"),
    (
        "Info",
        "docker_label max_best_of max_client_batch_size max_concurrent_requests max_input_tokens \
      max_stop_sequences max_total_tokens model_id model_pipeline_tag model_sha router sha validation_workers version",
    ),
    (
        "ChatRequest",
        "frequency_penalty logit_bias logprobs max_tokens messages model n presence_penalty response_format \
      seed stop stream stream_options temperature tool_choice tool_prompt tools top_logprobs top_p",
    ),
    (
        "CompletionRequest",
        "frequency_penalty max_tokens model prompt repetition_penalty seed stop stream suffix \
      temperature top_p",
    ),
    ("ChatTokenizeResponse", "templated_text tokenize_response"),
];

#[tokio::test]
async fn the_description_has_every_route_and_all_that_tgis_has() {
    let server = start().await;
    let document = document(server.address).await;
    let paths: BTreeSet<&str> = document["paths"].as_object().unwrap().keys().map(String::as_str).collect();
    for path in TGI_PATHS.into_iter().chain(["/vertex", "/v1/models", "/v1/models/{model}", "/v2/health/live"]) {
        assert!(paths.contains(path), "{path}");
    }
    for path in &paths {
        let methods = document["paths"][path].as_object().unwrap();
        let path = path.replace("{model}", "docs").replace(['{', '}'], "");
        for method in methods.keys() {
            let request = head(&method.to_uppercase(), &path, &[("Connection", "close"), ("Content-Length", "0")]);
            let status = ask(server.address, request.as_bytes()).await.status;
            assert!(status != 404 && status != 405, "{method} {path}: {status}");
        }
    }
    let schemas = &document["components"]["schemas"];
    for (name, properties) in TGI_SCHEMAS {
        for property in properties.split_whitespace() {
            assert!(schemas[name]["properties"].get(property).is_some(), "{name}.{property}: {}", schemas[name]);
        }
    }
}

#[tokio::test]
async fn the_description_is_shown_by_swagger_ui_which_loads_nothing_from_elsewhere() {
    let server = start().await;
    let moved = ask(server.address, &get("/docs")).await;
    assert_eq!((moved.status, moved.headers["location"].as_str()), (303, "docs/"));
    let page = ask(server.address, &get("/docs/")).await;
    assert!(page.status == 200 && page.headers["content-type"].starts_with("text/html"), "{:?}", page.headers);
    assert!(page.headers["content-security-policy"].contains("default-src 'none'"));
    assert!(!page.body.contains("http://") && !page.body.contains("https://"), "no address of another host");
    let places = page.body.split(['"', '\'']).filter(|part| part.ends_with(".js") || part.ends_with(".css"));
    let names: BTreeSet<&str> = places.map(|place| place.trim_start_matches("./")).collect();
    assert!(names.contains("swagger-ui-bundle.js"), "{names:?}");
    for name in names {
        let file = ask(server.address, &get(&format!("/docs/{name}"))).await;
        assert_eq!(file.status, 200, "{name}");
        if name == "swagger-initializer.js" {
            assert!(file.body.contains("../api-doc/openapi.json"), "{}", file.body);
        }
    }
    ask(server.address, &get("/docs/absent.js")).await.check_error(404, "not_found");
}

/// Whether the description of a route has this answer: its status and the type of its content.
fn is_described(document: &Value, path: &str, answer: &Answer) -> bool {
    let kind = answer.headers.get("content-type").map_or("", String::as_str);
    let told = &document["paths"][path]["post"]["responses"][answer.status.to_string()]["content"];
    told.get(kind.split(';').next().unwrap_or_default()).is_some()
}

#[tokio::test]
async fn the_description_tells_of_streams_and_of_models_that_are_not_served_wherever_a_request_may_ask_for_them() {
    let mut server = start().await;
    let document = document(server.address).await;
    let chat = json!({"messages": [{"role": "user", "content": "a"}]});
    let with = |body: &Value, name: &str, value: Value| {
        let mut body = body.clone();
        body[name] = value;
        body
    };
    for path in ["/v1/chat/completions", "/v1/completions", "/chat_tokenize", "/invocations", "/vertex"] {
        let body = if path == "/v1/completions" { json!({"prompt": "a"}) } else { chat.clone() };
        let other = with(&body, "model", json!("of another"));
        let other = if path == "/vertex" { json!({"instances": [other]}) } else { other };
        let refused = asked(server.address, path, other).await.unwrap();
        assert_eq!(refused.status, 404, "{path}");
        assert!(is_described(&document, path, &refused), "{path}");
    }
    for (path, body) in [
        ("/", json!({"inputs": "a"})),
        ("/generate_stream", json!({"inputs": "a"})),
        ("/v1/chat/completions", chat.clone()),
        ("/v1/completions", json!({"prompt": "a"})),
        ("/invocations", json!({"inputs": "a"})),
        ("/invocations", chat.clone()),
    ] {
        let asked = asked(server.address, path, with(&body, "stream", json!(true)));
        answer(server.submission().await, outputs(&["x"], FinishReason::EosToken)).await;
        let streamed = asked.await.unwrap();
        assert!(streamed.headers["content-type"].starts_with("text/event-stream"), "{path}");
        assert!(is_described(&document, path, &streamed), "{path}");
    }
}
