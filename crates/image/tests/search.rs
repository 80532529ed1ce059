//! Searches in the real `docker-registry`, and in made up ones.

#![allow(clippy::unwrap_used)]

mod common;

use std::io::Write;

use common::{Layout, Registry, Tar, begin_answer, host_architecture, made_up_registry};
use hull_image::{Credentials, Error, Reference, Result, SearchResult, remote_image, search};

fn names(found: Result<Vec<SearchResult>>) -> Vec<String> {
    found.unwrap().into_iter().map(|found| found.name).collect()
}

#[test]
fn a_registry_without_a_search_lists_its_repositories() {
    let registry = Registry::start();
    let layout = Layout::with(&[Tar::new().file("a", b"1").finish()]);
    for name in ["team/web:1", "website:2", "db:1"] {
        registry.push(&layout, "latest", name);
    }
    let host = format!("localhost:{}", registry.port);
    let find = |term: &str| search(&format!("{host}/{term}"), 100, &Credentials::anonymous());
    assert_eq!(
        names(find("web")),
        [format!("{host}/team/web"), format!("{host}/website")]
    );
    assert_eq!(names(find("team/")), [format!("{host}/team/web")]);
    assert!(find("nothing").unwrap().is_empty());
    assert!(matches!(find(" "), Err(Error::InvalidReference { .. })));
}

#[test]
fn what_a_search_says_is_bounded_and_plain() {
    let long = "d".repeat(5000);
    let port = made_up_registry(move |request, client| {
        let path = request.split(' ').nth(1).unwrap_or_default();
        let body = match path {
            "/v1/search?q=web+%26&n=2" => format!(
                r#"{{"results":[
                    {{"name":"a/web","description":null,"star_count":-3}},
                    {{"name":"b\u001b[31m","description":"{long}\n","star_count":7,
                      "is_official":true,"is_automated":true}},
                    {{"name":"c"}}]}}"#
            ),
            "/v1/search?q=List&n=2" => "<html>".to_owned(),
            "/v1/search?q=object&n=2" => "{}".to_owned(),
            "/v1/search?q=odd&n=2" => {
                r#"{"results":[{"star_count":1},7,{"name":"odd","star_count":null}]}"#.to_owned()
            }
            "/v1/search?q=busy&n=2" => {
                return begin_answer(client, "429 Too Many Requests", "");
            }
            "/v2/_catalog" => r#"{"repositories":["list","an/object"]}"#.to_owned(),
            _ => return begin_answer(client, "500 Internal Server Error", ""),
        };
        begin_answer(client, "200 OK", "");
        let _ = client.write_all(body.as_bytes());
    });
    let host = format!("localhost:{port}");
    let find = |term: &str| search(&format!("{host}/{term}"), 2, &Credentials::anonymous());
    let found = find("web &").unwrap();
    assert_eq!(found.len(), 2);
    let nothing = SearchResult {
        name: format!("{host}/a/web"),
        description: String::new(),
        stars: 0,
        official: false,
        automated: false,
    };
    assert_eq!(found[0], nothing);
    assert_eq!(found[1].name, format!("{host}/b [31m"));
    assert_eq!(found[1].description.len(), 1000);
    assert_eq!((found[1].stars, found[1].official), (7, true));
    // A page for people is no answer of a search.
    assert_eq!(names(find("List")), [format!("{host}/list")]);
    assert_eq!(names(find("object")), [format!("{host}/an/object")]);
    assert_eq!(names(find("odd")), [format!("{host}/odd")]);
    let error = find("busy").unwrap_err().to_string();
    assert!(error.contains("answered 429"), "{error}");
    let error = find("broken").unwrap_err().to_string();
    assert!(error.contains("cannot be searched for"), "{error}");
    assert!(error.contains("answered 500"), "{error}");
}

#[test]
fn an_account_is_used_only_where_a_search_asks_for_one() {
    let port = made_up_registry(|request, client| {
        let path = request.split(' ').nth(1).unwrap_or_default();
        let has_account = request.to_lowercase().contains("authorization: basic");
        match (path, has_account) {
            ("/v1/search?q=open&n=1", false) | ("/v1/search?q=closed&n=1", true) => {
                begin_answer(client, "200 OK", "");
                let _ = client.write_all(br#"{"results":[{"name":"x"}]}"#);
            }
            ("/v2/_catalog", true) => {
                begin_answer(client, "200 OK", "");
                let _ = client.write_all(br#"{"repositories":[]}"#);
            }
            _ => begin_answer(
                client,
                "401 Unauthorized",
                "WWW-Authenticate: Basic realm=\"r\"\r\n",
            ),
        }
    });
    let account = Credentials::basic("user".to_owned(), "secret".to_owned());
    let find =
        |term: &str, with: &Credentials| search(&format!("localhost:{port}/{term}"), 1, with);
    assert_eq!(find("open", &account).unwrap().len(), 1);
    assert_eq!(find("closed", &account).unwrap().len(), 1);
    // Nor is it sent to where a search is redirected.
    let elsewhere = made_up_registry(|request, client| {
        assert!(!request.to_lowercase().contains("authorization:"));
        let demand = "WWW-Authenticate: Basic realm=\"r\"\r\n";
        begin_answer(client, "401 Unauthorized", demand);
    });
    let from = made_up_registry(move |request, client| {
        let head = match request.split(' ').nth(1) {
            Some("/v2/") => return begin_answer(client, "401 Unauthorized", ""),
            Some("/v2/_catalog") => return begin_answer(client, "404 Not Found", ""),
            _ => format!("Location: http://127.0.0.1:{elsewhere}/v1/search\r\n"),
        };
        begin_answer(client, "302 Found", &head);
    });
    let error = search(&format!("localhost:{from}/x"), 1, &account).unwrap_err();
    assert!(error.to_string().contains("answered 404"), "{error}");
    let error = find("closed", &Credentials::anonymous()).unwrap_err();
    assert!(matches!(error, Error::Unauthorized { .. }), "{error}");
}

#[test]
fn an_image_is_described_without_a_pull() {
    let registry = Registry::start();
    let layout = Layout::with(&[Tar::new().file("a", b"1").finish()]);
    registry.push(&layout, "latest", "app:1");
    let Reference::Registry(name) = registry.name("app:1") else {
        panic!("no name of a registry");
    };
    let image = remote_image(&name, &Credentials::anonymous()).unwrap();
    assert_eq!(
        image.media_type,
        "application/vnd.oci.image.manifest.v1+json"
    );
    assert_eq!(image.platforms.len(), 1);
    assert_eq!(image.platforms[0].architecture, host_architecture());
    assert!(image.size > 100);
}
