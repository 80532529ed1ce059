//! docs/bounds.md against the numbers in the code.

use std::fs;

use hull_tests::repository;

/// The value of a constant's expression: numbers, shifts, sums and products of them, and other
/// constants of the file.
fn value(source: &str, expression: &str) -> u64 {
    let expression = expression.trim();
    for (operator, apply) in [
        (" + ", (|a, b| a + b) as fn(u64, u64) -> u64),
        (" << ", |a, b| a << b),
        (" * ", |a, b| a * b),
    ] {
        if let Some((left, right)) = expression.split_once(operator) {
            return apply(value(source, left), value(source, right));
        }
    }
    if let Some(seconds) = expression
        .strip_prefix("Duration::from_secs(")
        .and_then(|rest| rest.strip_suffix(')'))
    {
        return value(source, seconds);
    }
    match expression.replace('_', "").parse() {
        Ok(number) => number,
        Err(_) => constant(source, expression),
    }
}

fn constant(source: &str, name: &str) -> u64 {
    let declaration = format!("const {name}: ");
    let line = source
        .lines()
        .find(|line| line.contains(&declaration))
        .unwrap_or_else(|| panic!("no {declaration}"));
    let (_, expression) = line.trim_end_matches(';').split_once(" = ").unwrap();
    value(source, expression)
}

#[test]
fn documented_bounds_are_those_of_the_code() {
    let page = fs::read_to_string(repository().join("docs/bounds.md")).unwrap();
    let mut compared = 0;
    for row in page.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let Some((file, name)) = cells[2].split_once("` `") else {
            continue;
        };
        let source = repository().join("crates").join(file.trim_matches('`'));
        let source = fs::read_to_string(&source).unwrap_or_else(|_| panic!("{row}"));
        let (number, unit) = cells[1].split_once(' ').unwrap_or((cells[1], ""));
        let unit = match unit {
            "" | "B" | "s" => 1,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            other => panic!("unit {other}: {row}"),
        };
        let documented = number.parse::<u64>().unwrap() * unit;
        let actual = constant(&source, name.trim_matches('`'));
        assert_eq!(documented, actual, "{row}");
        compared += 1;
    }
    assert!(compared > 40, "{compared} bounds");
}
