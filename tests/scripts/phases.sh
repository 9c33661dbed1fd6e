# phase NAME COMMAND...: runs one step, prints how long it took, and at the end a table of all steps.
# Sourced by test.sh; the first step that fails ends the run.
# shellcheck shell=bash

phase_table=""
phase_began=$SECONDS

phase() {
    local name="$1" began=$SECONDS status=0
    shift
    printf '\n== %s\n' "$name" >&2
    "$@" </dev/null || status=$?
    local took=$((SECONDS - began)) verdict=ok
    [ "$status" = 0 ] || verdict="failed ($status)"
    phase_table+="$(printf '%-28s %5d s  %s' "$name" "$took" "$verdict")"$'\n'
    printf '== %s: %d s, %s\n' "$name" "$took" "$verdict" >&2
    [ "$status" = 0 ] || exit "$status"
}

phase_summary() {
    printf '\n%s%-28s %5d s\n' "$phase_table" "all" "$((SECONDS - phase_began))" >&2
}
trap phase_summary EXIT
