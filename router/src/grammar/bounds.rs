//! What costs too much is told by its numbers, before anything is made of it.

use regex_syntax::Parser;
use regex_syntax::hir::{Hir, HirKind};
use serde_json::{Map, Value};

use crate::request::limits::{MAX_MULTIPLE, MAX_MULTIPLES, MAX_OPTIONAL, MAX_REGEX_SIZE};

/// Decimal places of a `multipleOf`.
const MAX_PLACES: u32 = 9;

/// Refuses an expression that is too large; what is none is for others to judge.
pub(super) fn check_regex(regex: &str) -> Result<(), String> {
    let Ok(parsed) = Parser::new().parse(regex) else { return Ok(()) };
    match size(&parsed) {
        size if size > MAX_REGEX_SIZE => Err(format!(
            "it is too complex: with its repetitions written out it has {size} parts, at most {MAX_REGEX_SIZE} are taken"
        )),
        _ => Ok(()),
    }
}

/// Expressions are nested 250 levels deep at most.
fn size(parsed: &Hir) -> u64 {
    match parsed.kind() {
        HirKind::Empty | HirKind::Look(_) | HirKind::Class(_) => 1,
        HirKind::Literal(literal) => literal.0.len() as u64,
        HirKind::Capture(capture) => size(&capture.sub),
        HirKind::Repetition(repeated) => {
            size(&repeated.sub).saturating_mul(repeated.max.unwrap_or(repeated.min).max(1).into())
        }
        HirKind::Concat(parts) | HirKind::Alternation(parts) => parts.iter().map(size).fold(0, u64::saturating_add),
    }
}

/// The same of a schema's patterns, and of what its numbers are to be multiples of.
pub(super) fn check_schema(schema: &Value) -> Result<(), String> {
    let mut multiples = (1, 0);
    check_part(schema, &mut String::new(), &mut multiples)
}

/// JSON is nested 127 levels deep at most. `multiples`: the least common one so far, and its decimal places.
fn check_part(part: &Value, place: &mut String, multiples: &mut (u64, u32)) -> Result<(), String> {
    let at = |place: &str, reason: String| Err(format!("at {place}: {reason}"));
    match part {
        Value::Object(object) => {
            check_optional(object).or_else(|reason| at(if place.is_empty() { "/" } else { place }, reason))?;
            for (key, value) in object {
                let length = place.len();
                place.push('/');
                place.extend(key.chars().take(40));
                match (key.as_str(), value) {
                    ("pattern", Value::String(pattern)) => {
                        check_regex(pattern).or_else(|reason| at(place, reason))?;
                    }
                    ("patternProperties", Value::Object(patterns)) => {
                        for pattern in patterns.keys() {
                            check_regex(pattern).or_else(|reason| at(place, reason))?;
                        }
                        check_part(value, place, multiples)?;
                    }
                    ("multipleOf", Value::Number(number)) => {
                        let number = number.as_f64().unwrap_or(f64::NAN);
                        check_multiple(number, multiples).or_else(|reason| at(place, reason))?;
                    }
                    ("const" | "enum" | "default" | "examples", _) => {}
                    (_, value) => check_part(value, place, multiples)?,
                }
                place.truncate(length);
            }
            Ok(())
        }
        Value::Array(parts) => parts.iter().enumerate().try_for_each(|(n, part)| {
            let length = place.len();
            place.push_str(&format!("/{n}"));
            check_part(part, place, multiples)?;
            place.truncate(length);
            Ok(())
        }),
        _ => Ok(()),
    }
}

/// Each may follow each: what they cost grows with their square.
fn check_optional(object: &Map<String, Value>) -> Result<(), String> {
    let Some(properties) = object.get("properties").and_then(Value::as_object) else { return Ok(()) };
    let num_required = object.get("required").and_then(Value::as_array).map_or(0, Vec::len);
    match properties.len().saturating_sub(num_required) {
        optional if optional > MAX_OPTIONAL => Err(format!(
            "it is too complex: {optional} properties are not required, at most {MAX_OPTIONAL} of them are taken"
        )),
        _ => Ok(()),
    }
}

fn check_multiple(number: f64, (all, places): &mut (u64, u32)) -> Result<(), String> {
    let (mut whole, mut num_places) = (number, 0);
    while whole.fract() != 0.0 && num_places < MAX_PLACES {
        whole *= 10.0;
        num_places += 1;
    }
    if !(whole >= 1.0 && whole.fract() == 0.0 && whole <= MAX_MULTIPLE as f64) {
        return Err(format!(
            "`multipleOf` with more than {MAX_MULTIPLE} remainders, or none, is not supported: {number}"
        ));
    }
    let scale = |number: u64, by: u32| number.saturating_mul(10_u64.saturating_pow(by));
    let (one, before) =
        (scale(whole as u64, places.saturating_sub(num_places)), scale(*all, num_places.saturating_sub(*places)));
    (*all, *places) = ((before / gcd(before, one)).saturating_mul(one), num_places.max(*places));
    if *all > MAX_MULTIPLES {
        return Err(format!("the schema's `multipleOf` have more than {MAX_MULTIPLES} remainders together"));
    }
    Ok(())
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn repetitions_of_repetitions_are_counted_out() {
        for (regex, is_taken) in [
            ("a{10000}", true),
            ("a{10001}", false),
            ("(a{1000}){1000}", false),
            ("(ab|[c-z]+){1,3000}", true),
            ("((a?){101}){100}", false),
            ("(x{4000000000}){4000000000}", false),
            (".*a.*", true),
            ("(", true),
        ] {
            assert_eq!(check_regex(regex).is_ok(), is_taken, "{regex}");
        }
        let reason = check_schema(&json!({"items": {"pattern": "a{20000}"}})).unwrap_err();
        assert!(reason.starts_with("at /items/pattern: it is too complex"), "{reason}");
        assert!(check_schema(&json!({"patternProperties": {"a{20000}": {}}})).is_err());
        assert!(check_schema(&json!({"enum": [{"pattern": "a{20000}"}]})).is_ok(), "data");
    }

    #[test]
    fn multiples_count_by_their_remainders_also_together() {
        for (multiples, is_taken) in [
            (json!([0.01, 100]), true),
            (json!([5000]), true),
            (json!([5001]), false),
            (json!([1_000_003]), false),
            (json!([97, 101]), true),
            (json!([97, 101, 103]), false),
            (json!([0]), false),
            (json!([-1]), false),
            (json!([1e300]), false),
            (json!([1e-300]), false),
        ] {
            let parts: Vec<_> = multiples.as_array().unwrap().iter().map(|one| json!({"multipleOf": one})).collect();
            assert_eq!(check_schema(&json!({"allOf": parts})).is_ok(), is_taken, "{multiples}");
        }
    }
}
