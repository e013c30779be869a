//! `docs/launcher.md` is written from the parser: `WRITE=1 cargo test -p text-generation-launcher --test reference`.

#![allow(clippy::unwrap_used)]

use std::fmt::Write;
use std::path::Path;

use clap::{Arg, CommandFactory as _};

const HEAD: &str = "# Launcher reference

Every flag of `text-generation-launcher`, as `--help` prints it; written from the parser by a test. Each flag is also a variable of
the environment, of the name in the second column; a flag on the command line wins over it, and an empty variable counts as left out.
";

fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ").replace('<', "&lt;")
}

fn row(arg: &Arg) -> Option<String> {
    let flag = format!("`--{}`", arg.get_long()?);
    let short = arg.get_short().map(|short| format!(", `-{short}`")).unwrap_or_default();
    let env = arg.get_env().map(|name| format!("`{}`", name.to_string_lossy())).unwrap_or_default();
    let default = arg.get_default_values().iter().map(|value| format!("`{}`", value.to_string_lossy()));
    let default = default.collect::<Vec<_>>().join(", ");
    let possible = arg.get_possible_values();
    let is_switch = !arg.get_action().takes_values();
    let help = arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default();
    let mut help = format!("{}.", cell(help.trim_end_matches('.')));
    let is_boolean = possible.iter().any(|value| value.get_name() == "yes");
    if !possible.is_empty() && !is_boolean && !is_switch && !arg.is_hide_possible_values_set() {
        help.push_str(" One of:");
        for value in &possible {
            let meaning = value.get_help().map(|help| format!(" ({})", cell(help.to_string().trim_end_matches('.'))));
            write!(help, " `{}`{},", value.get_name(), meaning.unwrap_or_default()).unwrap();
        }
        help.pop();
        help.push('.');
    }
    Some(format!("| {flag}{short} | {env} | {} | {help} |\n", if is_switch { "" } else { default.as_str() }))
}

fn reference() -> String {
    let command = text_generation_launcher::args::command();
    let mut sections: Vec<(String, String)> = Vec::new();
    for arg in command.get_arguments().filter(|arg| !arg.is_hide_set()) {
        let (Some(heading), Some(row)) = (arg.get_help_heading(), row(arg)) else { continue };
        match sections.iter_mut().find(|(name, _)| name == heading) {
            Some((_, rows)) => rows.push_str(&row),
            None => sections.push((heading.to_owned(), row)),
        }
    }
    let table = |(name, rows): &(String, String)| {
        format!("\n## {name}\n\n| flag | variable | default | |\n|---|---|---|---|\n{rows}")
    };
    HEAD.to_owned() + &sections.iter().map(table).collect::<String>()
}

#[test]
fn the_launcher_reference_is_that_of_the_parser() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/launcher.md");
    if std::env::var_os("WRITE").is_some() {
        std::fs::write(&path, reference()).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == reference(),
        "docs/launcher.md is old: WRITE=1 cargo test -p text-generation-launcher --test reference"
    );
}

/// What the launcher leaves to the router, it leaves to the router's default, and says which that is.
#[test]
fn the_defaults_that_the_router_has_are_those_of_the_help() {
    let launcher = text_generation_launcher::args::command();
    let router = text_generation_router::args::Args::command();
    let mut num_said = 0;
    for flag in router.get_arguments() {
        let Some(ours) = launcher.get_arguments().find(|ours| ours.get_long() == flag.get_long()) else { continue };
        let Some(value) = flag.get_default_values().first().map(|value| value.to_string_lossy()) else { continue };
        if ours.get_default_values().first().is_some_and(|ours| *ours.to_string_lossy() == *value) {
            continue;
        }
        let help = ours.get_long_help().or(ours.get_help()).unwrap().to_string();
        assert!(help.contains(&format!("By default {value}")), "--{}: {value}, {help}", flag.get_long().unwrap());
        num_said += 1;
    }
    assert!(num_said >= 3, "{num_said}");
}

/// `docs/migrating-from-tgi.md` names every flag that TGI has and that has no effect here or is refused, under its heading.
#[test]
fn flags_of_tgi_stand_where_the_page_for_those_who_come_from_there_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/migrating-from-tgi.md");
    let page = std::fs::read_to_string(path).unwrap();
    for (beginning, heading) in [("Accepted, without effect", "without effect"), ("Refused by name", "not served yet")]
    {
        let paragraph = page.split("\n\n").find(|paragraph| paragraph.starts_with(beginning)).unwrap();
        let mut said: Vec<_> = paragraph.split('`').skip(1).step_by(2).map(str::to_owned).collect();
        let command = text_generation_launcher::args::command();
        let args = command.get_arguments().filter(|arg| arg.get_help_heading().is_some_and(|h| h.contains(heading)));
        // Hidden is what TGI knows as a variable alone.
        let mut found: Vec<_> = args
            .map(|arg| match arg.is_hide_set() {
                true => arg.get_env().unwrap().to_string_lossy().into_owned(),
                false => format!("--{}", arg.get_long().unwrap()),
            })
            .collect();
        said.sort();
        found.sort();
        assert_eq!(said, found, "{beginning}");
    }
}
