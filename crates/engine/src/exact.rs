//! Texts and paths of any bytes in JSON: as text where they are UTF-8, else as a list of bytes. For
//! `#[serde(with = "exact")]`, with modules for what holds several of them, or perhaps one.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Exact {
    Text(String),
    Bytes(Vec<u8>),
}

impl Exact {
    fn new(text: &OsStr) -> Self {
        match text.to_str() {
            Some(text) => Exact::Text(text.to_owned()),
            None => Exact::Bytes(text.as_bytes().to_vec()),
        }
    }

    fn read(self) -> OsString {
        match self {
            Exact::Text(text) => text.into(),
            Exact::Bytes(bytes) => OsString::from_vec(bytes),
        }
    }
}

/// Writes one text.
pub fn serialize<T, S>(text: &T, serializer: S) -> Result<S::Ok, S::Error>
where
    T: AsRef<OsStr>,
    S: Serializer,
{
    Exact::new(text.as_ref()).serialize(serializer)
}

/// Reads one text.
pub fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: From<OsString>,
    D: Deserializer<'de>,
{
    Ok(Exact::deserialize(deserializer)?.read().into())
}

/// Several texts.
pub mod list {
    use super::*;

    /// Writes them.
    pub fn serialize<T, S>(texts: &[T], serializer: S) -> Result<S::Ok, S::Error>
    where
        T: AsRef<OsStr>,
        S: Serializer,
    {
        serializer.collect_seq(texts.iter().map(|text| Exact::new(text.as_ref())))
    }

    /// Reads them.
    pub fn deserialize<'de, T, D>(deserializer: D) -> Result<Vec<T>, D::Error>
    where
        T: From<OsString>,
        D: Deserializer<'de>,
    {
        let texts = Vec::<Exact>::deserialize(deserializer)?;
        Ok(texts.into_iter().map(|text| text.read().into()).collect())
    }
}

/// One text, or none.
pub mod option {
    use super::*;

    /// Writes it.
    pub fn serialize<T, S>(text: &Option<T>, serializer: S) -> Result<S::Ok, S::Error>
    where
        T: AsRef<OsStr>,
        S: Serializer,
    {
        let text = text.as_ref().map(|text| Exact::new(text.as_ref()));
        text.serialize(serializer)
    }

    /// Reads it.
    pub fn deserialize<'de, T, D>(deserializer: D) -> Result<Option<T>, D::Error>
    where
        T: From<OsString>,
        D: Deserializer<'de>,
    {
        let text = Option::<Exact>::deserialize(deserializer)?;
        Ok(text.map(|text| text.read().into()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::path::PathBuf;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct All {
        #[serde(with = "super")]
        path: PathBuf,
        #[serde(with = "super::list")]
        words: Vec<OsString>,
        #[serde(with = "super::option")]
        word: Option<OsString>,
    }

    #[test]
    fn texts_of_any_bytes_are_read_as_they_were_written() {
        let odd = OsString::from_vec(b"/a\xff".to_vec());
        let all = All {
            path: odd.clone().into(),
            words: vec!["plain".into(), odd],
            word: None,
        };
        let text = serde_json::to_string(&all).unwrap();
        assert!(text.contains(r#"["plain",[47,97,255]]"#), "{text}");
        assert_eq!(serde_json::from_str::<All>(&text).unwrap(), all);
    }
}
