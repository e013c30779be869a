//! What is asked: prompts from a file, or random words.

use std::path::Path;

use anyhow::Context;

const WORDS: [&str; 64] = [
    "able", "air", "and", "apple", "back", "begin", "book", "build", "call", "city", "cold", "country", "day", "door",
    "early", "earth", "eat", "eight", "fall", "far", "field", "find", "fire", "garden", "gave", "great", "hand",
    "heaven", "house", "island", "king", "know", "land", "late", "letter", "light", "make", "mountain", "name",
    "night", "number", "old", "open", "paper", "people", "place", "quiet", "read", "river", "said", "school", "sea",
    "stone", "sun", "table", "ten", "time", "tree", "under", "voice", "water", "window", "word", "write",
];

/// The 64-bit finalizer of SplitMix64 (Steele, Lea and Flood 2014): one well mixed number for each input.
pub fn mix(input: u64) -> u64 {
    let mut z = input.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// `num_prompts` prompts of `num_words` words each; the same seed gives the same prompts.
pub fn random(num_prompts: usize, num_words: usize, seed: u64) -> Vec<String> {
    let word = |prompt: usize, position: usize| {
        let draw = mix(mix(seed ^ mix(prompt as u64)).wrapping_add(position as u64));
        WORDS[(draw % WORDS.len() as u64) as usize]
    };
    (0..num_prompts)
        .map(|prompt| (0..num_words).map(|position| word(prompt, position)).collect::<Vec<_>>().join(" "))
        .collect()
}

/// One prompt for each line that is not empty. A line that is a JSON string stands for its value, so that prompts may
/// have several lines.
pub fn from_file(path: &Path) -> anyhow::Result<Vec<String>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading the prompts {}", path.display()))?;
    let prompts: Vec<String> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| line.to_owned()))
        .collect();
    anyhow::ensure!(!prompts.is_empty(), "{}: found no prompt, expected one on each line", path.display());
    Ok(prompts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mixing_gives_the_published_numbers() {
        // The first outputs of SplitMix64 from seed 1234567, as listed with Vigna's reference implementation.
        let step = 0x9e37_79b9_7f4a_7c15_u64;
        let outputs = [0, 1, 2].map(|n: u64| mix(1_234_567_u64.wrapping_add(step.wrapping_mul(n))));
        assert_eq!(outputs, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }

    #[test]
    fn the_same_seed_gives_the_same_prompts_of_the_length_asked_for() {
        let prompts = random(5, 12, 1);
        assert!(prompts.iter().all(|prompt| prompt.split(' ').count() == 12));
        assert_eq!(prompts, random(5, 12, 1));
        assert_ne!(prompts, random(5, 12, 2));
        assert_ne!(prompts[0], prompts[1]);
    }

    #[test]
    fn lines_of_a_file_are_prompts_and_json_strings_are_their_values() {
        let path = std::env::temp_dir().join(format!("prompts-{}.txt", std::process::id()));
        std::fs::write(&path, "one line\n\n\"two\\nlines\"\n").unwrap();
        let prompts = from_file(&path);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(prompts.unwrap(), ["one line", "two\nlines"]);
    }
}
