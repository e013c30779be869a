//! `docs/metrics.md` has the table of the metrics that the code has, and the dashboard asks for no others.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use text_generation_router::telemetry::names::{METRICS, table};

#[test]
fn the_table_of_the_docs_is_that_of_the_code() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let before = text.split("| name |").next().unwrap();
    let expected = before.to_owned() + &table();
    if std::env::var_os("WRITE").is_some() {
        std::fs::write(&path, &expected).unwrap();
    }
    assert!(text == expected, "run again with WRITE=1 to write it");
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
