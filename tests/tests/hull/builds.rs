//! `hull build`: images from recipes, by buildah with hull's machines for their steps.

use std::fs;

use hull_tests::{Hull, Invocation, busybox_archive};

fn build(hull: &Hull, arguments: &[&str]) -> Invocation {
    let build = ["build", "--network", "none"];
    hull.with_buildah(hull.hull(build.iter().chain(arguments)))
}

fn context(hull: &Hull, recipe: &str) -> String {
    let context = hull.path("context");
    fs::create_dir_all(&context).unwrap();
    fs::copy(busybox_archive(), context.join("busybox.tar")).unwrap();
    fs::write(context.join("file"), "content\n").unwrap();
    fs::write(context.join("Dockerfile"), recipe).unwrap();
    context.to_str().unwrap().to_owned()
}

const RECIPE: &str = "FROM scratch AS base\n\
                      ADD busybox.tar /\n\
                      FROM base\n\
                      ARG WHO=nobody\n\
                      COPY file /file\n\
                      RUN echo $WHO >/made && uname -r >/kernel\n\
                      HEALTHCHECK CMD cat /made\n\
                      CMD [\"cat\", \"/made\", \"/file\"]\n";

#[test]
fn build_makes_an_image_whose_steps_ran_in_machines() {
    let hull = Hull::empty();
    let context = context(&hull, RECIPE);
    let id_file = hull.path("id");
    let arguments = [
        "-t",
        "made",
        "-t",
        "example.com/made:2",
        "--build-arg",
        "WHO=somebody",
        "--iidfile",
        id_file.to_str().unwrap(),
        &context,
    ];
    let built = build(&hull, &arguments).run().ok();
    assert!(built.error().contains("RUN echo"), "{}", built.error());
    let id = built.text();
    assert_eq!(fs::read_to_string(&id_file).unwrap(), id);
    for name in ["made", "example.com/made:2", &id] {
        let output = hull.hull(["run", "--rm", name]).run().ok().text();
        assert_eq!(output, "somebody\ncontent", "{name}");
    }
    let kernel = hull.hull(["run", "--rm", "made", "cat", "/kernel"]).run();
    assert!(kernel.ok().text().ends_with("-hull"));
    let health = ["inspect", "-f", "{{.Config.Healthcheck.Test}}", "made"];
    let health = hull.hull(health).run().ok().text();
    assert_eq!(health, "[CMD-SHELL cat /made]");

    // Nothing is executed again when nothing has changed; then the id is the same.
    assert_eq!(build(&hull, &arguments).run().ok().text(), id);
    hull.assert_clean();
    assert!(!hull.path("run/builds").read_dir().unwrap().any(|_| true));
}

#[test]
fn build_reads_the_recipe_from_standard_input() {
    let hull = Hull::empty();
    let context = context(&hull, "none");
    let recipe = "FROM scratch\nADD busybox.tar /\nCMD echo read\n";
    let built = build(&hull, &["-q", "-f", "-", &context]).input(recipe);
    let id = built.run().ok().text();
    assert_eq!(
        hull.hull(["run", "--rm", &id]).run().ok().text(),
        "read",
        "{id}"
    );
    let empty = build(&hull, &["-q", "-t", "empty", "-"]).input("FROM scratch\nLABEL a=b\n");
    empty.run().ok();
    let label = ["inspect", "-f", "{{.Config.Labels.a}}", "empty"];
    assert_eq!(hull.hull(label).run().ok().text(), "b");
}

#[test]
fn build_takes_an_archive_from_standard_input() {
    let hull = Hull::empty();
    let recipe = "FROM scratch\nADD busybox.tar /\nCOPY file /\nCMD cat /file\n";
    let context = context(&hull, recipe);
    fs::write(format!("{context}/Other"), recipe.replace("cat", "wc -l")).unwrap();
    for (compress, options, shown) in [("", &[][..], "content"), ("z", &["-f", "Other"], "1 /file")]
    {
        let archive = Invocation::new("tar")
            .args([&format!("c{compress}"), "-C", &context, "."])
            .run()
            .ok();
        let built = build(&hull, &["-q"])
            .args(options)
            .arg("-")
            .input(archive.stdout);
        let id = built.run().ok().text();
        assert_eq!(hull.hull(["run", "--rm", &id]).run().ok().text(), shown);
    }
    hull.assert_clean();
}

#[test]
fn build_begins_from_images_that_are_only_here() {
    let hull = Hull::new();
    hull.hull(["create", "--name", "base", "busybox"])
        .run()
        .ok();
    hull.hull(["commit", "-c", "ENV BASE=local", "base", "local/base:1"])
        .run()
        .ok();
    hull.hull(["rm", "base"]).run().ok();
    let recipe = "ARG FROM=local/base\nFROM $FROM:1 AS one\nRUN echo $BASE >/base\n\
                  FROM busybox\nCOPY --from=one /base /base\nCMD cat /base\n";
    let context = context(&hull, recipe);
    let id = build(&hull, &["-q", &context]).run().ok().text();
    assert_eq!(hull.hull(["run", "--rm", &id]).run().ok().text(), "local");
    // One that has changed since is taken anew.
    hull.hull(["create", "--name", "base", "busybox"])
        .run()
        .ok();
    hull.hull(["commit", "-c", "ENV BASE=another", "base", "local/base:1"])
        .run()
        .ok();
    hull.hull(["rm", "base"]).run().ok();
    let id = build(&hull, &["-q", &context]).run().ok().text();
    assert_eq!(hull.hull(["run", "--rm", &id]).run().ok().text(), "another");
    hull.assert_clean();
}

#[test]
fn a_build_that_fails_says_where_and_leaves_nothing() {
    let hull = Hull::empty();
    let context = context(
        &hull,
        "FROM scratch\nADD busybox.tar /\nRUN echo before && exit 42\n",
    );
    let failed = build(&hull, &["-t", "bad", &context]).run().ends(125);
    for part in [
        "RUN echo before && exit 42",
        "error: the build failed: buildah: exit status: 42",
    ] {
        assert!(failed.error().contains(part), "{}", failed.error());
    }
    assert_eq!(hull.hull(["image", "ls", "-q"]).run().ok().text(), "");
    build(&hull, &["-t", "UPPER", &context])
        .run()
        .fails(125, &["--tag", "UPPER"]);
    build(&hull, &["-f", "x", "-"])
        .run()
        .fails(125, &["the recipe is --file or standard input, not both"]);
    hull.with_buildah(hull.hull(["build", "--network", "host", &context]))
        .run()
        .fails(125, &["--network"]);
    let without = build(&hull, &[&context]).env("PATH", "/nowhere").run();
    without
        .fails(125, &["not supported: build without buildah"])
        .hint("apt-get install buildah");
}
