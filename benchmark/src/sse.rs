//! Server-sent events out of a stream of bytes that may be cut anywhere.

/// Collects the `data` of one event after the other. Its buffers are reused: no allocation per event.
///
/// Lines end with LF or CRLF. Comments and other fields are skipped, as is an event that the end of the stream cuts.
#[derive(Debug, Default)]
pub struct EventReader {
    /// A line whose end has not arrived.
    line: Vec<u8>,
    /// The `data` lines of the current event, or of the last one, joined by LF.
    data: Vec<u8>,
    has_data: bool,
}

impl EventReader {
    /// Takes the next bytes and calls `on_event` with the data of each event that they complete.
    pub fn feed(&mut self, mut bytes: &[u8], mut on_event: impl FnMut(&[u8])) {
        while let Some(end) = memchr::memchr(b'\n', bytes) {
            if self.line.is_empty() {
                self.end_line(&bytes[..end], &mut on_event);
            } else {
                let mut line = std::mem::take(&mut self.line);
                line.extend_from_slice(&bytes[..end]);
                self.end_line(&line, &mut on_event);
                line.clear();
                self.line = line;
            }
            bytes = &bytes[end + 1..];
        }
        self.line.extend_from_slice(bytes);
    }

    /// The data of the last event; empty before the first.
    pub fn last(&self) -> &[u8] {
        if self.has_data { &[] } else { &self.data }
    }

    /// Forgets everything, for the next stream.
    pub fn clear(&mut self) {
        self.line.clear();
        self.data.clear();
        self.has_data = false;
    }

    fn end_line(&mut self, line: &[u8], on_event: &mut impl FnMut(&[u8])) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            if self.has_data {
                self.has_data = false;
                on_event(&self.data);
            }
        } else if let Some(value) = line.strip_prefix(b"data:") {
            if self.has_data {
                self.data.push(b'\n');
            } else {
                self.data.clear();
                self.has_data = true;
            }
            self.data.extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(chunks: &[&[u8]]) -> Vec<String> {
        let mut reader = EventReader::default();
        let mut events = Vec::new();
        for chunk in chunks {
            reader.feed(chunk, |data| events.push(String::from_utf8(data.to_vec()).unwrap()));
        }
        events
    }

    // The second and third are examples of the HTML standard, section "Server-sent events".
    #[test]
    fn events_are_read_as_the_standard_says() {
        assert_eq!(events(&[b"data: {\"a\":1}\n\ndata: 2\n\n"]), ["{\"a\":1}", "2"]);
        assert_eq!(events(&[b"data: YHOO\ndata: +2\ndata: 10\n\n"]), ["YHOO\n+2\n10"]);
        assert_eq!(
            events(&[b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n"]),
            ["first event", "second event", " third event"]
        );
        assert_eq!(events(&[b"event: x\r\ndata: 1\r\n\r\n:\r\n\r\n"]), ["1"]);
        assert_eq!(events(&[b"data: cut off"]), [""; 0]);
    }

    #[test]
    fn a_stream_cut_anywhere_gives_the_same_events() {
        let stream = ":\n\ndata: {\"text\":\"zwölf\"}\r\n\r\nevent: x\ndata: a\ndata: b\n\ndata:[DONE]\n\n".as_bytes();
        let whole = events(&[stream]);
        assert_eq!(whole, ["{\"text\":\"zwölf\"}", "a\nb", "[DONE]"]);
        for first in 0..=stream.len() {
            for second in first..=stream.len() {
                assert_eq!(events(&[&stream[..first], &stream[first..second], &stream[second..]]), whole);
            }
        }
    }

    #[test]
    fn the_last_event_can_be_read_after_the_stream() {
        let mut reader = EventReader::default();
        reader.feed(b"data: 1\n\ndata: 2\n\n:\n\n", |_| {});
        assert_eq!(reader.last(), b"2");
        reader.clear();
        assert_eq!(reader.last(), b"");
    }
}
