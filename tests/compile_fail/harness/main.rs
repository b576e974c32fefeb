//! Checks the compiler's errors for the mistakes of newcomers.
//!
//! Each program beside this folder has one mistake, and is named after it. Beside each program is
//! the compiler's text. Read a changed text: its message, label and note must lead to the fix.
//! `TRYBUILD=overwrite cargo test --package compile-fail` writes the texts anew.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// The minor version of the compiler that wrote the texts. Other versions word them differently.
const WRITTEN_BY: u32 = 95;

#[test]
fn each_mistake_is_refused_with_the_text_that_was_read_by_a_person() {
    let minor = rustc_minor();
    if minor != WRITTEN_BY {
        let reason = format!("the texts are those of rustc 1.{WRITTEN_BY}, and this is 1.{minor}");
        let required = std::env::var_os("TOWER_TCP_CI").is_some();
        assert!(
            minor < WRITTEN_BY || !required,
            "{reason}: write them anew, and read them"
        );
        eprintln!("not compared: {reason}");
        return;
    }

    trybuild::TestCases::new().compile_fail("*.rs");
}

#[test]
fn no_mistake_is_told_twice() {
    let mut mistakes = 0;
    for program in files("rs") {
        let text = fs::read_to_string(program.with_extension("stderr")).unwrap_or_default();
        let told = |kind: &str| text.lines().filter(|line| line.starts_with(kind)).count();
        assert_eq!((told("error"), told("warning")), (1, 0), "{program:?}");
        mistakes += 1;
    }

    assert!(mistakes >= 30, "{mistakes}");
    assert_eq!(files("stderr").len(), mistakes);
}

fn files(extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(env!("CARGO_MANIFEST_DIR")).expect("the directory of the mistakes");
    let paths = entries.map(|entry| entry.expect("an entry of it").path());
    paths
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect()
}

/// The compiler's version, without its `1.`.
fn rustc_minor() -> u32 {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc).arg("--version").output();
    let version = String::from_utf8(output.expect("a compiler").stdout).expect("text");
    let minor = version
        .split('.')
        .nth(1)
        .and_then(|minor| minor.parse().ok());
    minor.unwrap_or_else(|| panic!("no version in {version:?}"))
}
