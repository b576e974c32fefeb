//! MIGRATION.md names only tests that exist, names every test of this folder, and skips no number.

use std::fs;
use std::path::{Path, PathBuf};

const PAGE: &str = include_str!("../../MIGRATION.md");

/// Returns the tests that the page names: code of the form `file::function` that is not a link.
fn named() -> Vec<(&'static str, &'static str)> {
    let lower = |name: &str| {
        let is_lower = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        !name.is_empty() && name.chars().all(is_lower)
    };
    let mut named = Vec::new();
    for line in PAGE.lines().filter(|line| line.starts_with('|')) {
        let parts: Vec<_> = line.split('`').collect();
        for (before, code) in parts.iter().zip(&parts[1..]).step_by(2) {
            let test = code
                .split_once("::")
                .filter(|(file, function)| lower(file) && lower(function));
            named.extend(test.filter(|_| !before.ends_with('[')));
        }
    }
    named
}

/// Returns the sources of a test file, or of a folder of them.
fn sources(file: &str) -> String {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let paths: Vec<PathBuf> = match fs::read_dir(tests.join(file)) {
        Ok(entries) => entries
            .map(|entry| entry.expect("the directory can be read").path())
            .collect(),
        Err(_) => vec![tests.join(file).with_extension("rs")],
    };
    let read = |path: &PathBuf| fs::read_to_string(path).unwrap_or_default();
    paths.iter().map(read).collect()
}

/// Returns the test functions of a source.
fn tests_in(source: &str) -> Vec<&str> {
    let lines: Vec<_> = source.lines().map(str::trim).collect();
    let is_test = |line: &str| line.starts_with("#[test]") || line.starts_with("#[tokio::test");
    let after = |i: usize| lines[i..].iter().find(|line| !line.starts_with("#["));
    (0..lines.len())
        .filter(|&i| is_test(lines[i]))
        .filter_map(|i| after(i)?.split_once("fn ")?.1.split_once('('))
        .map(|(name, _)| name)
        .collect()
}

#[test]
fn every_test_that_the_page_names_is_there() {
    let named = named();
    assert!(named.len() > 150, "only {} were found", named.len());

    let missing: Vec<_> = named
        .iter()
        .filter(|(file, function)| !tests_in(&sources(file)).contains(function))
        .collect();

    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn every_test_that_was_carried_over_is_named_by_the_page() {
    let sources = sources("seed");
    let is_numbered = |test: &&str| {
        let rest = test.trim_start_matches(['s', 't']);
        rest.starts_with(|c: char| c.is_ascii_digit())
    };
    let tests: Vec<_> = tests_in(&sources).into_iter().filter(is_numbered).collect();
    assert!(tests.len() > 40, "only {} were found", tests.len());

    let named = named();
    let unnamed: Vec<_> = tests
        .iter()
        .filter(|test| !named.contains(&("seed", test)))
        .collect();

    assert!(unnamed.is_empty(), "{unnamed:#?}");
}

#[test]
fn no_number_is_left_out_and_each_has_a_test_or_a_reason() {
    for (letter, most) in [('T', 17), ('S', 15), ('B', 34)] {
        for n in 1..=most {
            let row = format!("| {letter}{n} |");
            let rows: Vec<_> = PAGE.lines().filter(|line| line.starts_with(&row)).collect();
            let [row] = rows[..] else {
                panic!("{} rows of {letter}{n}", rows.len());
            };
            let last = row.trim_end_matches(" |").rsplit(" | ").next();
            let said = last.is_some_and(|last| {
                last.contains("::") || last.starts_with("cannot ") || last.starts_with("as T")
            });
            assert!(said, "{row}");
        }
    }
}
