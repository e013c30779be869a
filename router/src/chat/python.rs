//! What chat templates expect of Python and of transformers, beyond what the template engine knows itself.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, Tuple, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value};

/// Levels of nested values that are written as JSON.
const MAX_DEPTH: usize = 128;

/// Adds filters, functions and methods.
pub(super) fn install(environment: &mut Environment<'_>) {
    environment.set_unknown_method_callback(method);
    environment.add_filter("tojson", to_json);
    environment.add_filter("trim", |text: &str, chars: Option<&str>| strip(text, chars, Ends::Both).to_owned());
    environment.add_filter("escape", |text: String| escape(&text));
    environment.add_filter("e", |text: String| escape(&text));
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.set_formatter(|out, state, value| match f64::try_from(value.clone()) {
        Ok(number) if value.is_number() && !value.is_integer() => Ok(out.write_str(&float_repr(number))?),
        _ => minijinja::escape_formatter(out, state, value),
    });
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", |format: &str| strftime(format, SystemTime::now()));
}

/// As the markupsafe library escapes.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&#34;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// What a template says that refuses a chat.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub String);

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "the template refuses the chat").with_source(Raised(message)))
}

fn method(state: &mut State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let (ValueKind::String, Some(text)) = (value.kind(), value.as_str())
        && let Some(result) = string_method(text, name, args)
    {
        return result;
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Ends {
    Start,
    End,
    Both,
}

/// `None`: the engine knows it.
fn string_method(text: &str, name: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    let ends = match name {
        "strip" => Ends::Both,
        "lstrip" => Ends::Start,
        "rstrip" => Ends::End,
        _ => return other_string_method(text, name, args),
    };
    Some(from_args(args).map(|(chars,): (Option<&str>,)| Value::from(strip(text, chars, ends))))
}

fn other_string_method(text: &str, name: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    let one = || from_args(args).map(|(part,): (&str,)| part);
    Some(match name {
        "removeprefix" => one().map(|part| text.strip_prefix(part).unwrap_or(text).into()),
        "removesuffix" => one().map(|part| text.strip_suffix(part).unwrap_or(text).into()),
        "partition" => one().map(|part| three(text.split_once(part), part, (text, "", ""))),
        "rpartition" => one().map(|part| three(text.rsplit_once(part), part, ("", "", text))),
        "rsplit" => from_args(args).and_then(|(part, most): (&str, Option<i64>)| rsplit(text, part, most)),
        "zfill" => {
            from_args(args).map(|(width,): (u16,)| format!("{text:0>width$}", width = usize::from(width)).into())
        }
        _ => return None,
    })
}

fn three(found: Option<(&str, &str)>, part: &str, missing: (&str, &str, &str)) -> Value {
    let (before, middle, after) = found.map_or(missing, |(before, after)| (before, part, after));
    Tuple::new([before, middle, after].map(Value::from).into()).into()
}

fn rsplit(text: &str, part: &str, most: Option<i64>) -> Result<Value, Error> {
    if part.is_empty() {
        return Err(Error::new(ErrorKind::InvalidOperation, "rsplit: the separator is empty"));
    }
    let most = most.and_then(|most| usize::try_from(most).ok()).map_or(usize::MAX, |most| most.saturating_add(1));
    let mut parts: Vec<_> = text.rsplitn(most, part).map(Value::from).collect();
    parts.reverse();
    Ok(Value::from(parts))
}

/// As Python strips: its white space includes four separators that are none in Unicode.
fn strip<'a>(text: &'a str, chars: Option<&str>, ends: Ends) -> &'a str {
    let is_cut = |c: char| match chars {
        Some(chars) => chars.contains(c),
        None => c.is_whitespace() || ('\x1c'..='\x1f').contains(&c),
    };
    let text = if ends == Ends::End { text } else { text.trim_start_matches(is_cut) };
    if ends == Ends::Start { text } else { text.trim_end_matches(is_cut) }
}

/// `json.dumps` with the arguments that transformers' filter has.
fn to_json(state: &State<'_, '_>, value: &Value, args: Kwargs) -> Result<Value, Error> {
    let separators: Option<Value> = args.get("separators")?;
    let indent = match args.get::<Option<Value>>("indent")? {
        None => None,
        Some(indent) => Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(usize::try_from(indent)?.min(64)),
        }),
    };
    let (item, key) = match separators {
        Some(pair) => (text_of(&pair.get_item_by_index(0)?)?, text_of(&pair.get_item_by_index(1)?)?),
        None => ((if indent.is_some() { "," } else { ", " }).to_owned(), ": ".to_owned()),
    };
    let style = Style {
        ascii: args.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sorted: args.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        indent,
        item,
        key,
    };
    args.assert_all_used()?;
    let mut out = Json { text: String::new(), paid: 0, state, style };
    out.write(value, 0)?;
    Ok(Value::from(out.text))
}

fn text_of(value: &Value) -> Result<String, Error> {
    value.as_str().map(str::to_owned).ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "a separator is no text"))
}

struct Style {
    ascii: bool,
    sorted: bool,
    indent: Option<String>,
    item: String,
    key: String,
}

struct Json<'a, 't, 'e> {
    text: String,
    /// How much of the text has been paid for with fuel.
    paid: usize,
    state: &'a State<'t, 'e>,
    style: Style,
}

impl Json<'_, '_, '_> {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let wrong = |what: &str| Error::new(ErrorKind::InvalidOperation, format!("{what} cannot be written as JSON"));
        if depth > MAX_DEPTH {
            return Err(wrong("something nested so deep"));
        }
        if self.text.len() - self.paid > 4096 {
            self.state.consume_fuel(((self.text.len() - self.paid) / 64) as u64)?;
            self.paid = self.text.len();
        }
        match value.kind() {
            ValueKind::None => self.text.push_str("null"),
            ValueKind::Bool => self.text.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.number(value)?,
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<_> = value.try_iter()?.collect();
                self.list(('[', ']'), items.len(), depth, |json, i| json.write(&items[i], depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<_> = value.try_iter()?.collect();
                if self.style.sorted {
                    keys.sort_by(|a, b| a.as_str().cmp(&b.as_str()));
                }
                self.list(('{', '}'), keys.len(), depth, |json, i| {
                    let key = &keys[i];
                    json.string(&key.as_str().map_or_else(|| key.to_string(), str::to_owned));
                    let separator = json.style.key.clone();
                    json.text.push_str(&separator);
                    json.write(&value.get_item(key)?, depth + 1)
                })?;
            }
            kind => return Err(wrong(&kind.to_string())),
        }
        Ok(())
    }

    fn list(
        &mut self,
        (open, close): (char, char),
        len: usize,
        depth: usize,
        mut write: impl FnMut(&mut Self, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.text.push(open);
        for i in 0..len {
            if i > 0 {
                let separator = self.style.item.clone();
                self.text.push_str(&separator);
            }
            self.new_line(depth + 1);
            write(self, i)?;
        }
        if len > 0 {
            self.new_line(depth);
        }
        self.text.push(close);
        Ok(())
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = &self.style.indent {
            self.text.push('\n');
            (0..depth).for_each(|_| self.text.push_str(indent));
        }
    }

    fn number(&mut self, value: &Value) -> Result<(), Error> {
        if value.is_integer() {
            self.text.push_str(&value.to_string());
            return Ok(());
        }
        let number = f64::try_from(value.clone())?;
        self.text.push_str(&float_repr(number));
        Ok(())
    }

    fn string(&mut self, text: &str) {
        self.text.push('"');
        for c in text.chars() {
            match c {
                '"' => self.text.push_str("\\\""),
                '\\' => self.text.push_str("\\\\"),
                '\n' => self.text.push_str("\\n"),
                '\r' => self.text.push_str("\\r"),
                '\t' => self.text.push_str("\\t"),
                '\u{8}' => self.text.push_str("\\b"),
                '\u{c}' => self.text.push_str("\\f"),
                c if c < ' ' || self.style.ascii && !c.is_ascii() => {
                    let mut units = [0; 2];
                    for unit in c.encode_utf16(&mut units) {
                        // Writing to a string cannot fail.
                        let _ = write!(self.text, "\\u{unit:04x}");
                    }
                }
                c => self.text.push(c),
            }
        }
        self.text.push('"');
    }
}

/// As Python writes a float: the shortest digits that read as it, with an exponent below 1e-4 and from 1e16 on.
fn float_repr(number: f64) -> String {
    if number.is_nan() {
        return "NaN".into();
    }
    if number.is_infinite() {
        return if number > 0.0 { "Infinity" } else { "-Infinity" }.into();
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if number != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    format!("{number:?}")
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// Python's `strftime` in the C locale, of a moment in UTC. What is no directive of these stays as it is.
fn strftime(format: &str, now: SystemTime) -> String {
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64);
    let (days, time) = (seconds.div_euclid(86400), seconds.rem_euclid(86400));
    let (year, month, day) = civil(days);
    let day_of_year = days - days_before(year) + 1;
    let (hour, minute, second) = (time / 3600, time / 60 % 60, time % 60);
    let weekday = (days + 4).rem_euclid(7) as usize;
    let month_name = MONTHS[month as usize - 1];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let is_bare = directive == Some('-');
        if is_bare {
            directive = chars.next();
        }
        let padded = |value: i64| if is_bare { value.to_string() } else { format!("{value:02}") };
        let part = match directive {
            Some('Y') => year.to_string(),
            Some('y') => padded(year.rem_euclid(100)),
            Some('m') => padded(month),
            Some('d') => padded(day),
            Some('e') => format!("{day:2}"),
            Some('H') => padded(hour),
            Some('I') => padded((hour + 11) % 12 + 1),
            Some('M') => padded(minute),
            Some('S') => padded(second),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.into(),
            Some('j') if is_bare => day_of_year.to_string(),
            Some('j') => format!("{day_of_year:03}"),
            Some('B') => month_name.into(),
            Some('b' | 'h') => month_name[..3].into(),
            Some('A') => DAYS[weekday].into(),
            Some('a') => DAYS[weekday][..3].into(),
            Some('w') => weekday.to_string(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('D') => format!("{month:02}/{day:02}/{:02}", year.rem_euclid(100)),
            Some('R') => format!("{hour:02}:{minute:02}"),
            Some('Z' | 'z') => String::new(),
            Some('%') => "%".into(),
            Some(other) => format!("%{other}"),
            None => "%".into(),
        };
        out.push_str(&part);
    }
    out
}

/// Days from 1970 to the first of a year.
fn days_before(year: i64) -> i64 {
    let years = year - 1;
    years * 365 + years.div_euclid(4) - years.div_euclid(100) + years.div_euclid(400) - 719_162
}

/// Year, month and day of a day, counted from 1970.
fn civil(days: i64) -> (i64, i64, i64) {
    let mut year = 1970 + days.div_euclid(366);
    while days_before(year + 1) <= days {
        year += 1;
    }
    let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let mut rest = days - days_before(year);
    let lengths = [31, if is_leap { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for length in lengths {
        if rest < length {
            break;
        }
        rest -= length;
        month += 1;
    }
    (year, month, rest + 1)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn floats_are_written_as_python_does() {
        // What `repr` of CPython 3.11 says.
        for (number, expected) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (-2.5, "-2.5"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (-0.0, "-0.0"),
            (123456789.125, "123456789.125"),
        ] {
            assert_eq!(float_repr(number), expected);
        }
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        // What `date -u -d @seconds` says.
        for (seconds, format, expected) in [
            (0, "%d %b %Y", "01 Jan 1970"),
            (951_782_400, "%A, %B %d, %Y %H:%M:%S", "Tuesday, February 29, 2000 00:00:00"),
            (1_735_689_599, "%Y-%m-%d %T %j", "2024-12-31 23:59:59 366"),
            (1_735_689_600, "%-d/%-m/%y %a %w %I %p 100%%", "1/1/25 Wed 3 12 AM 100%"),
            (4_102_444_800, "%F", "2100-01-01"),
        ] {
            assert_eq!(strftime(format, UNIX_EPOCH + Duration::from_secs(seconds)), expected);
        }
    }
}
