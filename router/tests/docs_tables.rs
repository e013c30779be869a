//! The tables of `docs/` are those of the code (`WRITE=1` writes them), and the dashboard asks for no metrics but these.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use clap::Parser;
use text_generation_router::args::Args;
use text_generation_router::request::Limits;
use text_generation_router::request::limits::{Row, rows};
use text_generation_router::telemetry::names::{METRICS, table};

/// Compares the table of a file that begins with this heading.
fn check(file: &str, heading: &str, table: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(file);
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(heading).unwrap();
    let after = rest.find("\n\n").map_or("", |end| &rest[end + 1..]);
    let expected = [before, table, after].concat();
    if std::env::var_os("WRITE").is_some() {
        std::fs::write(&path, &expected).unwrap();
    }
    assert!(text == expected, "{file}: run again with WRITE=1 to write it");
}

#[test]
fn the_metrics_of_the_docs_are_those_of_the_code() {
    check("metrics.md", "| name |", &table());
}

#[test]
fn the_limits_of_the_docs_are_those_of_the_code() {
    let always = ["router", "--tokenizer-name", "m", "--model-id", "m", "--control-socket", "c"];
    let flags = Args::try_parse_from(always).unwrap().limits;
    let defaults = Limits {
        max_best_of: flags.max_best_of,
        max_client_batch_size: flags.max_client_batch_size,
        max_choices: flags.max_concurrent_requests,
        max_stop_sequences: flags.max_stop_sequences,
        max_top_n_tokens: flags.max_top_n_tokens,
        max_input_tokens: 0,
        max_total_tokens: 0,
        vocab_size: 0,
        max_token_bytes: None,
        model_id: String::new(),
    };
    let row = |row: &Row| format!("| {} | {} | {} |\n", row.what, row.limit, row.flag);
    let rows: String = rows(&defaults).iter().map(row).collect();
    check("api.md", "| what | limit |", &format!("| what | limit | flag |\n|---|---|---|\n{rows}"));
}

#[test]
fn the_dashboard_asks_for_metrics_that_there_are() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/grafana.json");
    let dashboard: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    let mut num_asked = 0;
    for target in targets {
        let expression = target["expr"].as_str().unwrap();
        let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        for name in words.filter(|word| word.starts_with("tgi_")) {
            let suffixes = ["_bucket", "_sum", "_count"];
            let base = suffixes.iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(name);
            let is_known = |name: &str| METRICS.iter().any(|metric| metric.name == name);
            assert!(is_known(name) || is_known(base), "{name} in {expression}");
            num_asked += 1;
        }
    }
    assert!(num_asked > 20, "{num_asked}");
}
