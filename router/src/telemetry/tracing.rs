//! Logs: to standard output, as text for people or as JSON.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// What the level of a log line is judged by: this server's own lines at `level`, those of libraries from warnings on. As
/// in TGI, anything that is no level is a filter in the syntax of `tracing-subscriber`.
pub fn filter(level: &str) -> Result<EnvFilter, String> {
    let own = |level: &str| format!("warn,text_generation_router={level},scheduler={level}");
    let directives = match level {
        "error" => "error".into(),
        "warn" | "info" | "debug" | "trace" => own(level),
        other => other.to_owned(),
    };
    EnvFilter::try_new(directives).map_err(|error| {
        format!("the log level {level:?} is neither error, warn, info, debug nor trace, nor a filter: {error}")
    })
}

/// Starts logging, once for the process.
pub fn init(level: &str, as_json: bool) -> Result<(), String> {
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter(level)?)
        .with_target(false)
        .with_ansi(std::io::stdout().is_terminal());
    let started = if as_json { logs.json().flatten_event(true).try_init() } else { logs.try_init() };
    started.map_err(|error| format!("cannot start logging: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_for_our_own_lines_and_anything_else_is_a_filter() {
        assert!(filter("info").unwrap().to_string().contains("text_generation_router=info"));
        assert_eq!(filter("hyper=trace").unwrap().to_string(), "hyper=trace");
        assert!(filter("router=loud").unwrap_err().contains("router=loud"));
    }
}
