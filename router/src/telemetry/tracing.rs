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
    let refused = |why: &dyn std::fmt::Display| {
        format!("the log level {level:?} is neither error, warn, info, debug nor trace, nor a filter: {why}")
    };
    // The name of a target alone would silence all others, and a wrong level is taken for one.
    let is_level = |part: &str| part == "off" || part.parse::<tracing::Level>().is_ok();
    let has_none = |part: &str| part.ends_with('=') || !(part.contains(['=', '[']) || is_level(part));
    if let Some(part) = directives.split(',').find(|part| has_none(part)) {
        let name = part.trim_end_matches('=');
        return Err(refused(&format!("{part:?} has no level; give it one, as in \"info,{name}=debug\"")));
    }
    EnvFilter::try_new(&directives).map_err(|error| refused(&error))
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
        assert!(filter("info,hyper=debug,off").is_ok());
        // Silence is not what is meant by them.
        for wrong in ["warning", "noisy!!", "info,hyper", "foo="] {
            assert!(filter(wrong).is_err(), "{wrong}");
        }
    }
}
