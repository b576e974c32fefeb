//! `tests/README.md` lists every test file once. It and `faults/README.md` explain every code in
//! the tests' names, and they name nothing that does not exist.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const PAGE: &str = include_str!("README.md");
const FAULTS: &str = include_str!("../faults/README.md");

/// Returns the names in backquotes that begin a table row under this heading of the page.
fn listed<'a>(page: &'a str, heading: &str) -> Vec<&'a str> {
    let (_, section) = page.split_once(heading).expect("the page has this heading");
    let section = section.split("\n## ").next().unwrap_or(section);
    let names = section.lines().map(|line| line.strip_prefix("| `"));
    names
        .filter_map(|row| Some(row?.split_once('`')?.0))
        .collect()
}

/// Returns the Rust files under `dir`.
fn files(dir: &str) -> Vec<PathBuf> {
    let mut dirs = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(dir)];
    let mut files = Vec::new();
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).expect("the directory can be read") {
            let path = entry.expect("the directory can be read").path();
            if path.is_dir() {
                if path.join("Cargo.toml").exists() {
                    continue; // A package of its own.
                }
                dirs.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files
}

/// Returns the codes at the front of a function's name: `s11`, `x71b` and `x71c` of
/// `s11_x71b_x71c_marks`.
fn codes(name: &str) -> impl Iterator<Item = &str> {
    name.split('_').take_while(|word| {
        let number = word.trim_start_matches(|c: char| c.is_ascii_lowercase());
        let digits = number.trim_end_matches(|c: char| c.is_ascii_lowercase());
        word.len() == number.len() + 1
            && number.len() <= digits.len() + 1
            && !digits.is_empty()
            && digits.chars().all(|c| c.is_ascii_digit())
    })
}

/// Returns the names of a source's tests.
fn tests_in(source: &str) -> impl Iterator<Item = &str> {
    let tests = ["#[test]", "#[tokio::test"].map(|attribute| source.split(attribute).skip(1));
    tests.into_iter().flatten().filter_map(|test| {
        let (_, function) = test.split_once("fn ")?;
        Some(function.split_once('(')?.0)
    })
}

/// Returns the codes in the names of a source's tests.
fn codes_in(source: &str) -> BTreeSet<String> {
    tests_in(source)
        .flat_map(codes)
        .map(str::to_owned)
        .collect()
}

/// Returns the codes in the names of all tests.
fn used() -> BTreeSet<String> {
    let sources = files("tests").into_iter().chain(files("src"));
    sources
        .flat_map(|path| codes_in(&fs::read_to_string(path).expect("it can be read")))
        .collect()
}

/// Returns whether this file has this test: `tls::name`, or `src::name` for a unit test.
fn there_is(test: &str) -> bool {
    let (file, name) = test.split_once("::").expect("file::test");
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests")
        .join(file);
    let sources = match file {
        "src" => files("src"),
        _ if dir.is_dir() => files(&format!("tests/{file}")),
        _ => vec![dir.with_extension("rs")],
    };
    sources.into_iter().any(|path| {
        let source = fs::read_to_string(path).unwrap_or_default();
        tests_in(&source).any(|test| test == name)
    })
}

#[test]
fn every_file_of_tests_is_listed_once_and_every_listed_file_is_there() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let there = files("tests").into_iter().map(|path| {
        let path = path.strip_prefix(&dir).expect("it is in the directory");
        path.to_str().expect("names are text").to_owned()
    });

    let listed = listed(PAGE, "\n## Files\n");
    let once: BTreeSet<_> = listed.iter().map(|file| (*file).to_owned()).collect();

    assert_eq!(listed.len(), once.len(), "a file is listed twice");
    let there: BTreeSet<_> = there.collect();
    let only_one: Vec<_> = once.symmetric_difference(&there).collect();
    assert!(
        only_one.is_empty(),
        "listed or there, not both: {only_one:?}"
    );
}

#[test]
fn every_code_in_a_tests_name_is_explained_once() {
    let of_tests = listed(PAGE, "\n## Codes in test names\n");
    let of_faults = FAULTS.lines().filter_map(|line| line.strip_prefix("| `"));
    let of_faults = of_faults.filter_map(|row| Some(row.split_once('`')?.0));
    let used = used();

    let unused: Vec<_> = of_tests
        .iter()
        .filter(|code| !used.contains(**code))
        .collect();
    assert!(unused.is_empty(), "explained, not used: {unused:?}");

    let mut explained = BTreeSet::new();
    for code in of_tests.into_iter().chain(of_faults) {
        assert!(
            explained.insert(code.to_owned()),
            "{code} is explained twice"
        );
    }
    let unexplained: Vec<_> = used.difference(&explained).collect();
    assert!(unexplained.is_empty(), "not explained: {unexplained:?}");
}

#[test]
fn every_fault_is_shown_by_tests_that_exist_or_says_that_it_is_not() {
    let used = used();
    let rows: Vec<_> = FAULTS
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.strip_suffix(" |"))
        .collect();
    assert!(rows.len() > 100, "only {} were found", rows.len());

    for row in rows {
        let columns: Vec<_> = row.split(" | ").collect();
        let [code, _, _, shown_by] = columns[..] else {
            panic!("a row has four columns: {row}")
        };
        let code = code.trim_end_matches('`');
        if shown_by == "not shown" {
            assert!(!used.contains(code), "a test shows {code}");
        } else if !shown_by.starts_with("by hand: `") {
            for test in shown_by.split(", ") {
                assert!(
                    there_is(test.trim_matches('`')),
                    "{code}: there is no {test}"
                );
            }
        }
    }
}

#[test]
fn codes_are_found_and_words_are_not_taken_for_codes() {
    let source = "
        #[test]
        fn s11_x71b_x71c_marks_are_changed() {}
        #[tokio::test(start_paused = true)]
        async fn a_b16_is_no_code_here() {}
        #[tokio::test]
        async fn http2_and_x5yz_are_no_codes() {}
        fn z9_is_no_test() {}
    ";

    let found = codes_in(source);

    assert_eq!(
        found.into_iter().collect::<Vec<_>>(),
        ["s11", "x71b", "x71c"]
    );
}
