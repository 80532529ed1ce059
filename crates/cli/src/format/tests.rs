//! Tables of templates, and what becomes of them.
#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};

use super::*;

fn data() -> Value {
    json!({
        "Id": "0123456789abcdef",
        "Name": "/web",
        "State": {"Status": "running", "Running": true, "ExitCode": 0, "Error": ""},
        "Config": {
            "Labels": {"b": "two", "a": "one", "com.example.c": "three"},
            "Env": ["A=1", "B=2"],
            "Entrypoint": null,
        },
        "Mounts": [
            {"Type": "bind", "Source": "/a", "RW": true},
            {"Type": "volume", "Source": "/v", "RW": false},
        ],
        "NetworkSettings": {
            "Networks": {"default": {"IPAddress": "10.0.0.2"}},
            "Ports": {"80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "8080"}], "443/tcp": null},
        },
        "Size": 1536,
        "Share": 0.5,
    })
}

fn rendered(template: &str) -> String {
    let parsed = Template::parse(template).unwrap_or_else(|why| panic!("{template}: {why}"));
    let rendered = parsed.render(&data());
    rendered.unwrap_or_else(|error| panic!("{template}: {error}"))
}

#[test]
fn templates_that_people_use_with_docker_give_what_docker_gives() {
    for (template, text) in [
        // Text and fields.
        ("", ""),
        ("plain", "plain"),
        ("{{.Name}}", "/web"),
        ("{{ .Name }}!", "/web!"),
        ("{{.State.Status}}", "running"),
        ("{{$.State.Status}}", "running"),
        ("{{(.State).Status}}", "running"),
        ("{{.State.Running}} {{.State.ExitCode}}", "true 0"),
        ("{{.Size}} {{.Share}}", "1536 0.5"),
        (r"a\tb\nc", "a\tb\nc"),
        // What Go prints for structures, maps, lists and nothing.
        ("{{.Config.Env}}", "[A=1 B=2]"),
        ("{{.Config.Labels}}", "map[a:one b:two com.example.c:three]"),
        ("{{.State}}", "{running true 0 }"),
        (
            "{{.NetworkSettings.Ports}}",
            "map[443/tcp:<nil> 80/tcp:[{0.0.0.0 8080}]]",
        ),
        ("{{.Config.Entrypoint}}", "<no value>"),
        ("{{.Config.Labels.a}}", "one"),
        ("{{.Config.Labels.nope}}", "<no value>"),
        // JSON.
        ("{{json .Config.Env}}", r#"["A=1","B=2"]"#),
        ("{{.Name | json}}", r#""/web""#),
        ("{{json .Config.Entrypoint}}", "null"),
        (
            "{{json .State}}",
            r#"{"Status":"running","Running":true,"ExitCode":0,"Error":""}"#,
        ),
        ("{{json .Config.Labels.nope}}", "null"),
        // Functions on strings.
        ("{{upper .Name}} {{.Name | upper | lower}}", "/WEB /web"),
        ("{{title \"two words\"}}", "Two Words"),
        ("{{truncate .Id 12}}", "0123456789ab"),
        ("{{truncate .Name 12}}", "/web"),
        ("[{{pad .Name 1 2}}][{{pad \"\" 1 2}}]", "[ /web  ][]"),
        ("{{split \"a,b\" \",\"}}", "[a b]"),
        ("{{index (split .Name \"/\") 1}}", "web"),
        ("{{join .Config.Env \", \"}}", "A=1, B=2"),
        ("{{join .Config.Entrypoint \" \"}}", ""),
        ("{{slice .Id 0 4}} {{slice .Config.Env 1}}", "0123 [B=2]"),
        ("{{trim \" x \"}}", "x"),
        // Printing.
        ("{{print 1 2 \"x\" 3}}", "1 2x3"),
        ("{{println \"x\" 1}}", "x 1\n"),
        (
            "{{printf \"%s:%d|%v|%q|%t|%%\" .Name .Size .Share \"a\" true}}",
            "/web:1536|0.5|\"a\"|true|%",
        ),
        (
            "{{printf \"%-6s|%6s|%.2s|%04d|%.1f|%x\" \"ab\" \"cd\" \"xyz\" 42 2.25 255}}",
            "ab    |    cd|xy|0042|2.2|ff",
        ),
        ("{{.Name | printf \"%s-%s\" \"x\"}}", "x-/web"),
        // Lengths and elements.
        (
            "{{len .Name}} {{len .Mounts}} {{len .Config.Labels}}",
            "4 2 3",
        ),
        ("{{index .Config.Labels \"com.example.c\"}}", "three"),
        ("[{{index .Config.Labels \"nope\"}}]", "[]"),
        (
            "{{(index (index .NetworkSettings.Ports \"80/tcp\") 0).HostPort}}",
            "8080",
        ),
        (
            "{{index .NetworkSettings.Ports \"80/tcp\" 0 \"HostPort\"}}",
            "8080",
        ),
        // Comparisons and logic.
        (
            "{{eq .Name \"/web\"}} {{eq .Name \"a\" \"/web\"}} {{ne 1 2}}",
            "true true true",
        ),
        (
            "{{lt 1 2}}{{le 2 2}}{{gt \"b\" \"a\"}}{{ge 1 2}}",
            "truetruetruefalse",
        ),
        (
            "{{and .Name 0}} {{or \"\" .Name}} {{not .Name}}",
            "0 /web false",
        ),
        ("{{or true (index .Config.Env 9)}}", "true"),
        ("{{eq (index .Config.Labels \"nope\") \"\"}}", "true"),
        // Blocks.
        ("{{if .State.Running}}up{{else}}down{{end}}", "up"),
        (
            "{{if eq .Size 1}}a{{else if eq .Size 1536}}b{{else}}c{{end}}d",
            "bd",
        ),
        ("{{if .Config.Entrypoint}}x{{end}}", ""),
        ("{{with .State}}{{.Status}}{{end}}", "running"),
        ("{{with .State.Error}}{{.}}{{else}}fine{{end}}", "fine"),
        ("{{with $x := .State.Status}}{{$x}}{{end}}", "running"),
        (
            "{{range .Mounts}}{{.Type}}={{.Source}} {{end}}",
            "bind=/a volume=/v ",
        ),
        ("{{range .Config.Env}}{{println .}}{{end}}", "A=1\nB=2\n"),
        ("{{range .Config.Entrypoint}}x{{else}}none{{end}}", "none"),
        (
            "{{range $k, $v := .Config.Labels}}{{$k}}={{$v}};{{end}}",
            "a=one;b=two;com.example.c=three;",
        ),
        (
            "{{range $i, $e := .Config.Env}}{{if $i}}, {{end}}{{$e}}{{end}}",
            "A=1, B=2",
        ),
        (
            "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}",
            "10.0.0.2",
        ),
        (
            "{{range $p, $c := .NetworkSettings.Ports}}{{if $c}}\
             {{$p}} -> {{(index $c 0).HostPort}}{{end}}{{end}}",
            "80/tcp -> 8080",
        ),
        ("{{range .Mounts}}{{$.Name}} {{end}}", "/web /web "),
        // Variables.
        ("{{$x := 1}}{{$x = 2}}{{$x}}", "2"),
        ("{{$x := 1}}{{if true}}{{$x := 2}}{{$x}}{{end}}{{$x}}", "21"),
        (
            "{{$x := 0}}{{range .Mounts}}{{$x = .Type}}{{end}}{{$x}}",
            "volume",
        ),
        ("{{$m := .State}}{{$m.Status}}", "running"),
        // Comments, white space, literals.
        ("a{{/* no */}}b", "ab"),
        ("a {{- /* no */ -}} b", "ab"),
        ("a \n{{- .Name -}} \n b", "a/webb"),
        ("{{- 3 -}} x", "3x"),
        ("{{-3}} {{1.5}} {{0x10}}", "-3 1.5 16"),
        (
            "{{`raw \\n`}} {{\"tab\\tquote\\\"\\u00e9\"}}",
            "raw \\n tab\tquote\"é",
        ),
        ("{{true}} {{nil | print}}", "true <no value>"),
        ("{{\"}}\"}}", "}}"),
        ("{{.Name\n| upper}}", "/WEB"),
        ("}} {", "}} {"),
    ] {
        assert_eq!(rendered(template), text, "{template}");
    }
}

#[test]
fn what_is_wrong_with_a_template_is_said_in_one_line_with_its_place() {
    for (template, why) in [
        ("{{.Name", "column 1: {{ has no end"),
        ("ab {{", "column 4: {{ has no end"),
        ("{{}}", "column 3: a value is missing"),
        ("{{.Name}} {{if .X}}", "column 11: the block has no {{end}}"),
        ("{{if}}x{{end}}", "column 5: a value is missing"),
        ("x{{end}}", "column 2: unexpected {{end}}"),
        ("{{else}}", "column 1: unexpected {{else}}"),
        (
            "{{if 1}}{{else}}{{else}}{{end}}",
            "column 17: a second {{else}}",
        ),
        (
            "{{nosuch .X}}",
            "column 3: function \"nosuch\" is not defined: there are and,",
        ),
        ("a\n{{nosuch}}", "line 2, column 3: function"),
        ("{{$x}}", "column 3: undefined variable $x"),
        ("{{$x = 1}}", "column 3: undefined variable $x"),
        (
            "{{if true}}{{$x := 1}}{{end}}{{$x}}",
            "column 32: undefined variable $x",
        ),
        ("{{$a, $b := .X}}", "column 7: too many variables"),
        ("{{.X | 3}}", "column 7: only a function takes a value"),
        ("{{.X .Y}", "column 8: unexpected '}'"),
        ("{{.my-key}}", "column 6: unexpected '-'"),
        ("{{(.X}}", "column 3: ( has no end"),
        ("{{.X)}}", "column 5: unexpected )"),
        ("{{\"x}}", "column 3: the string has no end"),
        ("{{\"\\z\"}}", "column 3: unknown escape \\z"),
        ("{{12x}}", "column 3: \"12x\" is no number"),
        ("{{/* x }}", "column 3: the comment has no end"),
        ("{{template \"x\"}}", "column 1: not supported: template"),
        ("é{{nosuch}}", "column 4: function"),
    ] {
        let error = Template::parse(template).unwrap_err();
        assert!(
            error.starts_with(&format!("template, {why}")),
            "{template}: {error}"
        );
        assert!(!error.contains('\n'), "{error}");
    }
}

#[test]
fn what_data_do_not_have_is_named() {
    for (template, why) in [
        (
            "{{.Nope}}",
            "column 3: there is no field .Nope; there are .Config, .Id, .Mounts,",
        ),
        (
            "{{.State.Nope}}",
            "column 9: there is no field .Nope; there are .Error,",
        ),
        (
            "{{.Name.First}}",
            "column 8: there is no field .First in a string",
        ),
        (
            "{{.Config.Labels.nope.x}}",
            "column 22: there is no field .x in no value",
        ),
        (
            "{{index .Mounts 7}}",
            "column 3: index: index 7 of a list with 2 elements",
        ),
        (
            "{{index (index .NetworkSettings.Ports \"1/tcp\") 0}}",
            "column 3: index: no value has no elements",
        ),
        (
            "{{upper .Size}}",
            "column 3: upper: a string is needed, not a number",
        ),
        (
            "{{upper}}",
            "column 3: upper takes 1 argument, and 0 are given",
        ),
        ("{{.Name \"x\"}}", "column 3: .Name takes no arguments"),
        ("{{.Label \"x\"}}", "column 3: .Label takes the key"),
        (
            "{{lt 1 \"a\"}}",
            "column 3: lt: cannot compare a number with a string",
        ),
        (
            "{{printf \"%d\" .Name}}",
            "column 3: printf: %d is not for a string",
        ),
        (
            "{{printf \"%s\"}}",
            "column 3: printf: nothing is given for %s",
        ),
        (
            "{{range .Name}}{{end}}",
            "column 9: cannot range over a string",
        ),
        (
            "{{slice .Name 3 9}}",
            "column 3: slice: no part from 3 to 9",
        ),
    ] {
        let error = Template::parse(template)
            .unwrap()
            .render(&data())
            .unwrap_err();
        assert!(
            error
                .message
                .starts_with(&format!("--format: template, {why}")),
            "{template}: {error}"
        );
        assert!(!error.message.contains('\n'));
    }
}

#[test]
fn a_template_neither_overflows_nor_runs_for_ever() {
    let deep = "{{if true}}".repeat(1000) + &"{{end}}".repeat(1000);
    assert!(
        Template::parse(&deep)
            .unwrap_err()
            .contains("too many blocks")
    );
    let deep = format!("{{{{{}1{}}}}}", "(".repeat(10_000), ")".repeat(10_000));
    assert!(
        Template::parse(&deep)
            .unwrap_err()
            .contains("too many blocks")
    );
    let fails = |template: &str, root: &Value, why: &str| {
        let error = Template::parse(template).unwrap().render(root).unwrap_err();
        assert!(error.message.contains(why), "{template}: {error}");
    };
    let doubling = "{{$x = print $x $x}}".repeat(30);
    fails(
        &format!("{{{{$x := \"xxxx\"}}}}{doubling}"),
        &data(),
        "too long",
    );
    let many = Value::from(vec![json!(1); 1100]);
    let nested = "{{range .}}{{range $}}{{end}}{{end}}";
    fails(nested, &many, "too many steps");
    let wide = "{{$s := printf \"%1000s\" \"\"}}{{range .}}{{range $}}{{$s}}{{end}}{{end}}";
    fails(wide, &many, "too long");
    fails("{{printf \"%99999999999s\" \"\"}}", &many, "at most 1000");
}

#[test]
fn text_of_a_guest_does_not_control_the_terminal() {
    let data = json!({"A": "x\u{1b}[31m\ny\u{202e}"});
    let render = |template: &str| Template::parse(template).unwrap().render(&data).unwrap();
    assert_eq!(render("{{.A}}"), "x\u{fffd}[31m\ny\u{fffd}");
    assert_eq!(render("{{json .A}}"), r#""x\u001b[31m\ny\u202e""#);
    assert_eq!(render("\u{1b}[1m"), "\u{1b}[1m", "one's own is kept");
}

const HEADINGS: [(&str, &str); 4] = [
    ("ID", "CONTAINER ID"),
    ("Names", "NAMES"),
    ("Labels", "LABELS"),
    ("State", "STATE"),
];

fn listed(format: &str, rows: Vec<Row>) -> Result<Option<String>> {
    list(&ListFormat::parse(format).unwrap(), &HEADINGS, rows)
}

fn rows() -> Vec<Row> {
    let labels = [
        ("a".to_owned(), "1".to_owned()),
        ("b".to_owned(), String::new()),
    ];
    vec![
        Row::new()
            .field("ID", "abc")
            .field("Names", "a-long-name")
            .labels(labels.iter().map(|(key, value)| (key, value)))
            .field("State", "running"),
        Row::new()
            .field("ID", "def")
            .field("Names", "b")
            .labels([])
            .field("State", "exited"),
    ]
}

#[test]
fn lists_are_lines_json_or_tables_with_headings() {
    for (format, text) in [
        ("{{.ID}}: {{.Names}}", "abc: a-long-name\ndef: b\n"),
        ("{{.Labels}}|{{.Label \"a\"}}", "a=1,b=|1\n|\n"),
        ("{{\"a\" | .Label}}", "1\n\n"),
        (
            "json",
            "{\"ID\":\"abc\",\"Names\":\"a-long-name\",\"Labels\":\"a=1,b=\",\"State\":\"running\"}\n\
             {\"ID\":\"def\",\"Names\":\"b\",\"Labels\":\"\",\"State\":\"exited\"}\n",
        ),
        (
            r"table {{.Names}}\t{{upper .State}}\t{{.ID}}",
            "NAMES         STATE     CONTAINER ID\n\
             a-long-name   RUNNING   abc\n\
             b             EXITED    def\n",
        ),
        (
            "table {{.ID}}\t{{.Label \"a\"}}",
            "CONTAINER ID   a\nabc            1\ndef\n",
        ),
        ("table{{.ID}}", "tableabc\ntabledef\n"),
    ] {
        assert_eq!(listed(format, rows()).unwrap().unwrap(), text, "{format}");
    }
    assert_eq!(
        listed("{{json .}}", rows()).unwrap(),
        listed("json", rows()).unwrap()
    );
    for usual in ["table", " table ", ""] {
        assert_eq!(listed(usual, rows()).unwrap(), None, "{usual:?}");
    }
    assert_eq!(
        listed("table {{.ID}}", Vec::new()).unwrap().unwrap(),
        "CONTAINER ID\n"
    );
}

#[test]
fn a_field_that_rows_do_not_have_is_an_error_also_of_an_empty_list() {
    for (format, column) in [("{{.Name}}", 3), ("table {{.Name}}", 9)] {
        for rows in [rows(), Vec::new()] {
            let error = listed(format, rows).unwrap_err();
            let message = format!(
                "--format: template, column {column}: there is no field .Name; \
                 there are .ID, .Labels, .Names, .State"
            );
            assert_eq!(error.message, message);
        }
    }
    let error = ListFormat::parse("table {{.ID").unwrap_err();
    assert!(error.starts_with("template, column 7: "), "{error}");
    // Headings are text, whatever the rows are.
    assert_eq!(listed("{{len .ID}}", Vec::new()).unwrap().unwrap(), "");
}

#[test]
fn objects_are_json_on_one_line_or_what_a_template_makes_of_them() {
    let line = |format: &str| {
        ObjectFormat::parse(format)
            .unwrap()
            .line(&json!({"A": [1]}))
    };
    assert_eq!(line("json").unwrap(), "{\"A\":[1]}\n");
    assert_eq!(line("{{index .A 0}}").unwrap(), "1\n");
    assert_eq!(line("table").unwrap(), "table\n");
}
