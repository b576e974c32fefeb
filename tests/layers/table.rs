//! LAYERS.md names a test in each row that says what a layer does, and names every test of this
//! folder.

use std::fs;
use std::path::Path;

const PAGE: &str = include_str!("../../LAYERS.md");

/// Returns the rows of the tables about layers, which have a last column `test`.
fn rows() -> Vec<&'static str> {
    let mut rows = Vec::new();
    let mut names_tests = false;
    for line in PAGE.lines() {
        if line.ends_with("| test |") {
            names_tests = true;
        } else if !line.starts_with('|') {
            names_tests = false;
        } else if names_tests && !line.starts_with("| ---") {
            rows.push(line);
        }
    }
    rows
}

/// Returns the tests that a row names in its last column: `file::function`.
fn named(row: &str) -> Vec<(&str, &str)> {
    let last = row.trim_end_matches(" |").rsplit(" | ").next();
    let names = last.into_iter().flat_map(|last| last.split(", "));
    names
        .filter_map(|name| name.trim_matches('`').split_once("::"))
        .collect()
}

/// Returns the source of a test file, or the sources of a folder of them.
fn source(file: &str) -> String {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    match fs::read_dir(tests.join(file)) {
        Ok(entries) => entries
            .flatten()
            .filter_map(|entry| fs::read_to_string(entry.path()).ok())
            .collect(),
        Err(_) => fs::read_to_string(tests.join(file).with_extension("rs")).unwrap_or_default(),
    }
}

/// Returns the test functions of a source.
fn tests_in(source: &str) -> Vec<&str> {
    let mut lines = source.lines().map(str::trim);
    let mut found = Vec::new();
    while let Some(line) = lines.next() {
        if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
            let function = lines.next().and_then(|line| line.split_once("fn "));
            found.extend(function.and_then(|(_, name)| name.split('(').next()));
        }
    }
    found
}

#[test]
fn every_row_names_tests_that_there_are() {
    let rows = rows();
    assert!(rows.len() > 50, "only {} were found", rows.len());

    for row in rows {
        let named = named(row);
        assert!(!named.is_empty(), "{row}");
        for (file, test) in named {
            let found = tests_in(&source(file)).contains(&test);
            assert!(found, "there is no {file}::{test}");
        }
    }
}

#[test]
fn every_test_of_what_a_layer_does_is_named_by_a_row() {
    let rows = rows();
    let named: Vec<_> = rows.iter().flat_map(|row| named(row)).collect();
    let source = source("layers");
    let own = tests_of_this_file();

    let tests = tests_in(&source);
    let unnamed: Vec<_> = tests
        .into_iter()
        .filter(|test| !own.contains(test) && !named.contains(&("layers", test)))
        .collect();

    assert!(unnamed.is_empty(), "{unnamed:#?}");
}

fn tests_of_this_file() -> Vec<&'static str> {
    tests_in(include_str!("table.rs"))
}
