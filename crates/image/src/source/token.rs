//! The `Authorization` of requests to a registry: credentials, or a token in exchange for them.
//!
//! Called by the HTTP module before each request. Asks `/v2/` how to authenticate, then the token
//! service that the answer names, within the policy of `realm`: one request without redirects, an
//! answer of at most 1 MiB. Never prints a token or a password.

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http_auth::parser::ChallengeParser;
use reqwest::header::{HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Response, StatusCode, Url};
use serde::Deserialize;
use tokio::sync::Mutex;

use super::http::{Failure, Http, read};
use super::realm::{Trust, judge};
use crate::credentials::Auth;
use crate::limits::TOKEN_ANSWER;

/// How long a token is good for if the service does not say: that of the specification.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);
/// Longest use of a token.
const MAX_LIFETIME: Duration = Duration::from_secs(3600);

/// The token service's answer.
#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    token: String,
    /// Its name in OAuth 2.
    #[serde(default)]
    access_token: String,
    /// Seconds.
    #[serde(default)]
    expires_in: serde_json::Value,
}

/// How to authenticate, from an answer of the registry.
#[derive(Debug, PartialEq, Eq)]
enum Challenge {
    /// With a token of this service.
    Bearer {
        realm: String,
        service: Option<String>,
    },
    /// With credentials, or not at all.
    Basic,
}

/// Obtains tokens for one repository, or for the registry itself, and remembers the last one.
pub(super) struct Tokens {
    auth: Auth,
    scope: Option<String>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    current: Option<Current>,
    /// The token service that did not get the credentials.
    withheld: Option<String>,
}

struct Current {
    authorization: Option<HeaderValue>,
    until: Option<Instant>,
}

impl Tokens {
    pub(super) fn new(auth: Auth, scope: Option<String>) -> Self {
        Self {
            auth,
            scope,
            state: Mutex::default(),
        }
    }

    pub(super) async fn withheld(&self) -> Option<String> {
        self.state.lock().await.withheld.clone()
    }

    /// The header for a request to the registry, and whether it is a token of an earlier request.
    /// Requests that run at once wait for one token.
    pub(super) async fn authorization(
        &self,
        http: &Http,
    ) -> Result<(Option<HeaderValue>, bool), Failure> {
        let mut state = self.state.lock().await;
        if let Some(current) = &state.current
            && current.until.is_none_or(|until| Instant::now() < until)
        {
            return Ok((current.authorization.clone(), current.until.is_some()));
        }
        let current = self.obtain(http, &mut state.withheld).await?;
        let authorization = current.authorization.clone();
        state.current = Some(current);
        Ok((authorization, false))
    }

    /// Forgets the token.
    pub(super) async fn forget(&self) {
        self.state.lock().await.current = None;
    }

    async fn obtain(&self, http: &Http, withheld: &mut Option<String>) -> Result<Current, Failure> {
        let lasting = |authorization| Current {
            authorization,
            until: None,
        };
        if let Auth::Bearer(token) = &self.auth {
            return Ok(lasting(Some(bearer(token)?)));
        }
        let Challenge::Bearer { realm, service } = challenge(&http.ping().await?) else {
            let basic = self.auth.basic_header();
            return Ok(lasting(basic.map(|text| header(&text)).transpose()?));
        };
        let refused = |reason: &str| Failure::Refused(format!("its token service {reason}"));
        let mut url = Url::parse(&realm).map_err(|_| refused("has an address that is no URL"))?;
        let shown = shown(&url);
        let credentials = self.auth.basic_header();
        let credentials = match judge(http.registry(), &url) {
            Trust::Credentials => credentials,
            Trust::Anonymous => {
                if credentials.is_some() {
                    *withheld = Some(shown.clone());
                }
                None
            }
            Trust::Nothing => return Err(refused(&format!("{shown} does not use https"))),
        };
        // What the registry wrote there would be sent as credentials.
        if url.set_username("").is_err() || url.set_password(None).is_err() {
            return Err(refused(&format!("{shown} has no host")));
        }
        {
            let mut query = url.query_pairs_mut();
            if let Some(scope) = &self.scope {
                query.append_pair("scope", scope);
            }
            if let Some(service) = &service {
                query.append_pair("service", service);
            }
        }
        let credentials = credentials.map(|text| header(&text)).transpose()?;
        let response = http.once(url, credentials).await?;
        match response.status() {
            StatusCode::OK => {}
            status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                return Err(Failure::Status {
                    status: status.as_u16(),
                    message: String::new(),
                });
            }
            status if status.is_redirection() => {
                return Err(refused(&format!(
                    "{shown} redirects, which is not followed"
                )));
            }
            status => {
                return Err(refused(&format!("{shown} answered {}", status.as_u16())));
            }
        }
        let too_large = || refused(&format!("{shown} answered more than {TOKEN_ANSWER} bytes"));
        let body = read(response, TOKEN_ANSWER).await?.ok_or_else(too_large)?;
        // The parser's message could quote the token.
        let answer: Answer = serde_json::from_slice(&body)
            .map_err(|_| refused(&format!("{shown} did not answer with a token")))?;
        let token = match answer.token.as_str() {
            "" => answer.access_token.as_str(),
            token => token,
        };
        if token.is_empty() {
            return Err(refused(&format!("{shown} did not answer with a token")));
        }
        let lifetime = answer
            .expires_in
            .as_u64()
            .map_or(DEFAULT_LIFETIME, Duration::from_secs)
            .clamp(DEFAULT_LIFETIME, MAX_LIFETIME);
        Ok(Current {
            authorization: Some(bearer(token)?),
            // Not so late that it ends on the way.
            until: Instant::now().checked_add(lifetime - lifetime / 10),
        })
    }
}

/// The first challenge of an answer that can be met.
fn challenge(response: &Response) -> Challenge {
    for value in response.headers().get_all(WWW_AUTHENTICATE) {
        let Ok(text) = value.to_str() else { continue };
        if let Some(found) = bearer_challenge(text) {
            return found;
        }
    }
    Challenge::Basic
}

fn bearer_challenge(text: &str) -> Option<Challenge> {
    for challenge in ChallengeParser::new(text) {
        let challenge = challenge.ok()?;
        if !challenge.scheme.eq_ignore_ascii_case("bearer") {
            continue;
        }
        let parameter = |name: &str| {
            let mut all = challenge.params.iter();
            all.find(|(known, _)| known.eq_ignore_ascii_case(name))
                .map(|(_, value)| value.to_unescaped())
        };
        if let Some(realm) = parameter("realm") {
            let service = parameter("service");
            return Some(Challenge::Bearer { realm, service });
        }
    }
    None
}

/// Scheme, host, port and path of a realm, for messages.
fn shown(realm: &Url) -> String {
    let port = realm
        .port()
        .map_or(String::new(), |port| format!(":{port}"));
    let host = realm.host_str().unwrap_or_default();
    let text = format!("{}://{host}{port}{}", realm.scheme(), realm.path());
    text.chars().take(200).collect()
}

fn bearer(token: &str) -> Result<HeaderValue, Failure> {
    header(&format!("Bearer {token}"))
}

/// A header that is not shown in any output.
fn header(text: &str) -> Result<HeaderValue, Failure> {
    let mut value = HeaderValue::from_str(text).map_err(|_| {
        Failure::Refused("the token for it has characters that no header may have".to_owned())
    })?;
    value.set_sensitive(true);
    Ok(value)
}

impl Auth {
    /// `Basic …`, for a user and a password.
    fn basic_header(&self) -> Option<String> {
        match self {
            Self::Basic(user, password) => Some(format!(
                "Basic {}",
                STANDARD.encode(format!("{user}:{password}"))
            )),
            Self::Anonymous | Self::Bearer(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges() {
        let bearer = |realm: &str, service: Option<&str>| {
            Some(Challenge::Bearer {
                realm: realm.to_owned(),
                service: service.map(str::to_owned),
            })
        };
        for (text, found) in [
            (
                r#"Bearer realm="https://a/t",service="s""#,
                bearer("https://a/t", Some("s")),
            ),
            (r#"bearer Realm="https://a/t""#, bearer("https://a/t", None)),
            (r#"Basic realm="x", Bearer realm="y""#, bearer("y", None)),
            (r#"Bearer error="x""#, None),
            (r#"Basic realm="x""#, None),
            (r#"Bearer realm="x"#, None),
            ("", None),
        ] {
            assert_eq!(bearer_challenge(text), found, "{text}");
        }
    }
}
