//! podman-compose with hull in place of podman: services that are built, find each other, and go.

use std::fs;
use std::time::Duration;

use hull_tests::{Hull, Invocation, busybox_archive, eventually, needs};

use crate::created::Net;

fn compose(hull: &Hull, arguments: &[&str]) -> Invocation {
    needs(&["podman-compose"]);
    let (hull_command, _) = hull.hull([""; 0]).into_parts();
    let directory = hull.path("project");
    let mut command = Invocation::new("podman-compose")
        .arg("--podman-path")
        .arg(hull_command.get_program())
        .args(arguments)
        .with(|command| {
            command.current_dir(directory);
        })
        .limit(Duration::from_secs(60));
    for (name, value) in hull_command.get_envs() {
        if let (Some(name), Some(value)) = (name.to_str(), value) {
            command = command.env(name, value);
        }
    }
    hull.with_buildah(command)
}

const PROJECT: &str = r#"
version: "3"
services:
  web:
    build:
      context: ./web
      target: web
    image: WEB
    volumes: ["data:/data", "./web:/src:ro"]
    environment: {WHO: somebody}
    healthcheck: {test: ["CMD", "test", "-e", "/data/up"], interval: 200ms}
    restart: unless-stopped
    stop_signal: SIGKILL
    command: ["touch /data/up; cat /src/page >/www/index.html; exec httpd -f -p 80 -h /www"]
    entrypoint: ["sh", "-c"]
  client:
    image: WEB
    depends_on: [web]
    stop_signal: SIGKILL
    command: ["sh", "-c", "until wget -qO- http://web/; do sleep 0.1; done; exec sleep 1000"]
volumes: {data: {}}
networks: {default: {external: {name: NETWORK}}}
"#;

#[test]
fn a_compose_file_is_brought_up_and_down() {
    let hull = Hull::networked("uml");
    let net = Net::create(&hull, &[]);
    let web = hull.path("project/web");
    fs::create_dir_all(&web).unwrap();
    fs::copy(busybox_archive(), web.join("busybox.tar")).unwrap();
    fs::write(web.join("page"), "a page\n").unwrap();
    // Nothing is executed: a step with a network would change that of this host.
    let recipe = "FROM scratch AS web\nADD busybox.tar /\nWORKDIR /www\n";
    fs::write(web.join("Dockerfile"), recipe).unwrap();
    let project = PROJECT
        .replace("NETWORK", &net.name)
        .replace("WEB", "example.com/web:1");
    fs::write(hull.path("project/docker-compose.yml"), project).unwrap();

    compose(&hull, &["up", "-d"]).run().ok();
    let client = hull.container("project_client_1");
    eventually("it answers", Duration::from_secs(20), || {
        client.does("logs").ok().text() == "a page"
    });
    let logs = compose(&hull, &["logs"]).run().ok().text();
    assert!(logs.lines().any(|line| line == "a page"), "{logs}");
    let ps = compose(&hull, &["ps"]).run().ok().text();
    assert!(ps.contains("project_web_1"), "{ps}");
    let web = hull.container("project_web_1");
    eventually("it is healthy", Duration::from_secs(10), || {
        web.inspect()["State"]["Health"]["Status"] == "healthy"
    });
    let said = compose(&hull, &["exec", "-T", "web", "sh", "-c", "echo $WHO"]);
    let said = said.run().ok().text();
    assert!(said.lines().any(|line| line == "somebody"), "{said}");
    compose(&hull, &["restart", "-t", "0", "client"]).run().ok();
    assert_eq!(client.state(), "running");

    compose(&hull, &["down", "-v"]).run().ok();
    assert!(hull.names().is_empty());
    assert_eq!(hull.hull(["volume", "ls", "-q"]).run().ok().text(), "");
    hull.assert_clean();
}
