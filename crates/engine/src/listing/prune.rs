//! Conditions on what is removed because nothing uses it.

use std::collections::BTreeMap;

use crate::time::{self, UnixNanos};

/// One condition; all have to hold.
#[derive(Clone, Debug, PartialEq)]
pub enum PruneFilter {
    /// Created before this time.
    Until(UnixNanos),
    /// It has a label, with this value.
    Label(String, Option<String>),
    /// It has not.
    NoLabel(String, Option<String>),
}

impl PruneFilter {
    /// Reads `until=TIME`, `label=KEY[=VALUE]` or `label!=KEY[=VALUE]`.
    ///
    /// # Errors
    /// It is none of these.
    pub fn parse(text: &str) -> Result<Self, String> {
        let pair = |label: &str| match label.split_once('=') {
            Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
            None => (label.to_owned(), None),
        };
        if let Some(label) = text.strip_prefix("label!=") {
            let (key, value) = pair(label);
            return Ok(Self::NoLabel(key, value));
        }
        match text.split_once('=') {
            Some(("label", label)) => {
                let (key, value) = pair(label);
                Ok(Self::Label(key, value))
            }
            Some(("until", time)) => time::parse_since(time).map(Self::Until),
            _ => Err(format!(
                "invalid filter {text:?}: give until=TIME, label=KEY[=VALUE] or label!=KEY[=VALUE]"
            )),
        }
    }

    /// Whether all of them select what has these labels, and was created then.
    pub fn all_select(
        filters: &[Self],
        created_ns: u64,
        labels: &BTreeMap<String, String>,
    ) -> bool {
        let mut all = filters.iter();
        all.all(|filter| filter.selects(created_ns, labels))
    }

    fn selects(&self, created_ns: u64, labels: &BTreeMap<String, String>) -> bool {
        let has = |key: &String, value: &Option<String>| {
            let known = labels.get(key);
            known.is_some_and(|known| value.as_ref().is_none_or(|value| known == value))
        };
        match self {
            Self::Until(time) => i128::from(created_ns) < *time,
            Self::Label(key, value) => has(key, value),
            Self::NoLabel(key, value) => !has(key, value),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn conditions() {
        let labels: BTreeMap<_, _> = [("a".to_owned(), "b".to_owned())].into();
        for (text, selected) in [
            ("label=a", true),
            ("label=a=b", true),
            ("label=a=c", false),
            ("label!=a", false),
            ("label!=a=c", true),
            ("label!=x", true),
            ("until=1s", true),
            ("until=2020-01-01T00:00:00Z", false),
        ] {
            let filter = PruneFilter::parse(text).unwrap();
            let created_ns = time::parse_rfc3339("2021-01-01T00:00:00Z").unwrap();
            assert_eq!(
                filter.selects(created_ns as u64, &labels),
                selected,
                "{text}"
            );
        }
        for wrong in ["name=x", "until=soon", "label"] {
            assert!(PruneFilter::parse(wrong).is_err(), "{wrong}");
        }
    }
}
