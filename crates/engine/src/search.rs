//! Searches for images in registries: Docker's filters. Called by the command line and the API.

use hull_image::SearchResult;

/// One condition on what a search found; all must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SearchFilter {
    /// At least so many stars.
    Stars(u64),
    /// Whether the registry vouches for it.
    Official(bool),
    /// Whether the registry built it.
    Automated(bool),
}

impl SearchFilter {
    /// Reads `KEY=VALUE`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| format!("invalid filter {text:?}: {why}");
        let flag = |value: &str| match value {
            "true" | "1" => Ok(true),
            "false" | "0" => Ok(false),
            _ => Err(wrong("it is true or false")),
        };
        match text.split_once('=') {
            Some(("stars", number)) => match number.parse() {
                Ok(number) => Ok(Self::Stars(number)),
                Err(_) => Err(wrong("stars is a number")),
            },
            Some(("is-official", value)) => flag(value).map(Self::Official),
            Some(("is-automated", value)) => flag(value).map(Self::Automated),
            _ => Err(wrong(
                "give stars=NUMBER, is-official=true|false or is-automated=true|false",
            )),
        }
    }

    /// Whether it holds for a result.
    pub fn selects(&self, result: &SearchResult) -> bool {
        match *self {
            Self::Stars(least) => result.stars >= least,
            Self::Official(wanted) => result.official == wanted,
            Self::Automated(wanted) => result.automated == wanted,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn filters_of_searches() {
        let result = SearchResult {
            name: "busybox".to_owned(),
            description: String::new(),
            stars: 3,
            official: true,
            automated: false,
        };
        for (text, selects) in [
            ("stars=3", true),
            ("stars=4", false),
            ("is-official=true", true),
            ("is-official=0", false),
            ("is-automated=false", true),
            ("is-automated=true", false),
        ] {
            let filter = SearchFilter::parse(text).unwrap();
            assert_eq!(filter.selects(&result), selects, "{text}");
        }
        for text in ["stars=many", "is-official=maybe", "name=x", "stars", ""] {
            assert!(SearchFilter::parse(text).is_err(), "{text}");
        }
    }
}
