//! Who may call: API keys, and the part of the prefix cache that belongs to each.

use std::fmt;
use std::sync::Arc;

use axum::http::{HeaderMap, header};
use subtle::{Choice, ConstantTimeEq};

use super::error::ApiError;

/// The keys of this server. Never logged, never told.
#[derive(Clone, Default)]
pub struct ApiKeys(Arc<Vec<Vec<u8>>>);

impl fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} keys", self.0.len())
    }
}

/// Prompts of one namespace may be known from each other's answering times.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Namespace(pub u64);

impl ApiKeys {
    /// Without keys, anybody may call.
    pub fn new(keys: impl IntoIterator<Item = Vec<u8>>) -> Self {
        let mut known: Vec<Vec<u8>> = vec![];
        for key in keys {
            if !known.contains(&key) {
                known.push(key);
            }
        }
        Self(Arc::new(known))
    }

    /// The namespace of whoever calls.
    pub(super) fn check(&self, headers: &HeaderMap) -> Result<Namespace, ApiError> {
        if self.0.is_empty() {
            return Ok(Namespace(0));
        }
        let mut given = headers.get_all(header::AUTHORIZATION).iter();
        let (Some(value), None) = (given.next(), given.next()) else { return Err(ApiError::unauthorized()) };
        let (scheme, key) = value.as_bytes().split_at_checked(7).ok_or_else(ApiError::unauthorized)?;
        if !scheme.eq_ignore_ascii_case(b"bearer ") {
            return Err(ApiError::unauthorized());
        }
        self.find(key).ok_or_else(ApiError::unauthorized)
    }

    /// Compares with all keys, every byte, whichever is the one: the time tells nothing but lengths.
    fn find(&self, key: &[u8]) -> Option<Namespace> {
        let (mut is_known, mut found) = (Choice::from(0), 0);
        for (n, known) in self.0.iter().enumerate() {
            let is_equal = known.as_slice().ct_eq(key);
            is_known |= is_equal;
            found |= (n as u64 + 1) * u64::from(is_equal.unwrap_u8());
        }
        bool::from(is_known).then_some(Namespace(found))
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn headers(values: &[&[u8]]) -> HeaderMap {
        let values = values.iter().map(|value| HeaderValue::from_bytes(value).unwrap());
        values.map(|value| (header::AUTHORIZATION, value)).collect()
    }

    #[test]
    fn a_key_is_compared_exactly_and_its_scheme_in_any_case() {
        let long = "k".repeat(8 << 10);
        let keys = ApiKeys::new(["secret", "schlüssel", &long, "secret"].map(|key| key.as_bytes().to_vec()));
        let check = |values: &[&[u8]]| keys.check(&headers(values)).ok();
        assert_eq!(check(&[b"Bearer secret"]), Some(Namespace(1)));
        assert_eq!(check(&[b"bEARER secret"]), Some(Namespace(1)));
        assert_eq!(check(&["Bearer schlüssel".as_bytes()]), Some(Namespace(2)));
        assert_eq!(check(&[format!("Bearer {long}").as_bytes()]), Some(Namespace(3)));
        for wrong in
            [&b""[..], b"secret", b"Bearer", b"Bearer ", b"Bearer Secret", b"Bearer secret ", b"Bearer  secret"]
        {
            assert_eq!(check(&[wrong]), None, "{:?}", String::from_utf8_lossy(wrong));
        }
        assert_eq!(check(&[b"Basic secret"]), None);
        assert_eq!(check(&[b"Bearer secret", b"Bearer secret"]), None, "two headers");
        assert_eq!(check(&[]), None);
        assert_eq!(format!("{keys:?}"), "3 keys");
    }

    #[test]
    fn without_keys_anybody_may_call() {
        assert_eq!(ApiKeys::default().check(&HeaderMap::new()).ok(), Some(Namespace(0)));
    }
}
