# Turns what `make soak` printed into tests/REPORT.md: of each test that passed, what it measured, and the bound it is held
# to. A failed run writes no page, so a line stands there only if its test passed.

/^ +Running / {
    target = $2 == "unittests" ? $3 : $2
    command = "cargo test --lib"
    program = $NF
    gsub(/.*\/|-[0-9a-f]+\)$/, "", program)
    if (target ~ /^src\/lib/) { gsub(/_/, "-", program); command = "cargo test -p " program " --lib NAME" }
    else command = "cargo test -p weft-tests --test " program " NAME"
    fresh = 1
}

/^test / { name = $2 }

# Where several tests ran at a time, what each said is shown together at the end.
/^---- .* stdout ----$/ { name = $2 }

/figure: / {
    said = $0
    sub(/^.*figure: /, "", said)
    bound = ""
    if (match(said, / \(bound [^()]*\)$/)) {
        bound = substr(said, RSTART + 8, RLENGTH - 9)
        said = substr(said, 1, RSTART - 1)
    }
    gsub(/\|/, "\\|", said)
    if (fresh) {
        printf "\n## `%s -- --include-ignored --nocapture`\n\n| test | measured | bound |\n|---|---|---|\n", command
        fresh = 0
    }
    shown = name == last ? "" : "`" name "`"
    last = name
    printf "| %s | %s | %s |\n", shown, said, bound
}
