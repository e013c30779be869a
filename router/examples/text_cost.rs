//! What a token costs on its way to text: incremental detokenization and the search for stop strings, as a table:
//! `cargo run --release -p text-generation-router --example text_cost`.

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use text_generation_router::text::detokenizer::Detokenizer;
use text_generation_router::text::stop_strings::StopMatcher;
use text_generation_router::text::tokenizer::Tokenizer;

/// Tokens of one answer, and answers that are measured.
const NUM_TOKENS: usize = 1000;
const NUM_ANSWERS: usize = 300;

/// What the answers say; the last is several tokens a character, in this vocabulary.
const TEXTS: [(&str, &str); 3] = [
    ("prose", "In the beginning God created the heaven and the earth. And the earth was without form, and void. "),
    ("program", "def f(items):\n    return [item for item in items if item is not None]\n\n"),
    ("emoji", "🙂🙃 naïve café 東京 "),
];

/// Stop strings that begin as the texts do, again and again, and come in none of them.
fn stops(count: usize) -> Vec<String> {
    let all = ["and the earth is round", "\n    return None", " in items if it must", "🙂🙂"];
    all.iter().take(count).map(|stop| (*stop).to_owned()).collect()
}

/// The time of each answer per token, sorted.
fn measure(tokenizer: &Arc<Tokenizer>, ids: &[u32], num_stops: usize) -> Vec<Duration> {
    let stops = stops(num_stops);
    let answer = || {
        let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), &[]);
        let mut matcher = StopMatcher::new(&stops, true);
        let began = Instant::now();
        for id in ids {
            let piece = detokenizer.push(*id);
            black_box(matcher.push(&piece));
        }
        began.elapsed() / u32::try_from(ids.len()).expect("some thousands")
    };
    let mut times: Vec<_> = (0..NUM_ANSWERS).map(|_| answer()).collect();
    times.sort();
    times
}

fn main() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/docs-llama-7m/tokenizer.json");
    let tokenizer = Arc::new(Tokenizer::from_file(&file).expect("the shipped tokenizer"));
    println!("| text | stop strings | median ns | p99 ns |");
    println!("|---|---|---|---|");
    for (name, text) in TEXTS {
        let ids = tokenizer.encode(&text.repeat(NUM_TOKENS), false).expect("a text");
        for num_stops in [0, 1, 4] {
            let times = measure(&tokenizer, &ids[..NUM_TOKENS], num_stops);
            let (median, p99) = (times[times.len() / 2].as_nanos(), times[times.len() * 99 / 100].as_nanos());
            println!("| {name} | {num_stops} | {median} | {p99} |");
        }
    }
}
