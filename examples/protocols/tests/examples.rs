//! Every example of this package has a file of tests, and explains its options.

use std::path::Path;

#[path = "../../../tests/support/process.rs"]
mod process;

/// Returns the names of the examples.
fn examples() -> Vec<String> {
    let dir = std::fs::read_dir(env!("CARGO_MANIFEST_DIR")).expect("it can be read");
    dir.map(|entry| entry.expect("it can be read").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned()))
        .collect()
}

#[test]
fn every_example_has_a_file_of_tests() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    for name in examples() {
        assert!(tests.join(&name).with_extension("rs").exists(), "{name}");
    }
}

#[tokio::test]
async fn every_example_explains_its_options() {
    for name in examples() {
        process::explains_its_options(&name).await;
    }
}
