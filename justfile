# Formatting and lints.
check:
    cargo fmt --all --check
    cargo clippy --all-targets --all-features -- -D warnings

test:
    cargo test

doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --all-features

# What each room costs, beside a baseline: `just bench dispatch` for one.
bench *filter:
    cargo bench --bench rooms -- {{filter}}

# Licences, duplicates, sources (needs cargo-deny).
deny:
    cargo deny --all-features check

# What CI runs.
ci:
    bash .ci/run
