# Formatting and lints.
check:
    cargo fmt --all --check
    cargo clippy --all-targets --all-features -- -D warnings

test:
    cargo test

doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --all-features

# Licences, duplicates, sources (needs cargo-deny).
deny:
    cargo deny --all-features check

# What CI runs.
ci:
    bash .ci/run
