# Reads what the Makefile says about itself: lists it (mode=help), or checks what make was called with (mode=check).
#
#   awk -v mode=help -v width=80 -f scripts/targets.awk Makefile
#   awk -v mode=check -f scripts/targets.awk Makefile sft LR=1     targets; variables with the first word of their value
#
#   ##@ Heading
#   target: ## meaning
#   ##= NAME, NAME  for target, target: a|b: meaning               “for …:” and the choices may be missing
#   ##=   goes on
#
# A mistake is one line on stderr, with the nearest right name, and exit code 1. Any awk of POSIX does, mawk too.

BEGIN {
    for (i = 2; i < ARGC; i++) {
        called[++calls] = ARGV[i]
        ARGV[i] = "" # awk would take it for a file or an assignment of its own
    }
}

/^##@ / { heading = substr($0, 5) }
/^##= +[^ ]/ {
    more = $0
    if ($0 !~ /^##=  /) {
        names[++lines] = part(substr($0, 5), "  ") # sets right too
        heading_of_line[lines] = heading
        more = right
    }
    sub(/^(##=)? */, "", more)
    text[lines] = text[lines] (text[lines] == "" ? "" : " ") more
}
/^[a-z][a-z-]*:.* ## / {
    targets[++target_count] = name = part($0, ":")
    sub(/^.* ## /, "")
    meaning[name] = $0
    heading_of[name] = heading
}

END {
    for (i = 1; i <= lines; i++) read_line(names[i], text[i])
    if (mode == "help") help()
    else if (complaint() != "") {
        print "openpangu-sft: " said | "cat >&2"
        exit 1
    }
}

# Cuts a text at its first separator: gives what stands left of it, and sets left and right.
function part(text, separator,    at) {
    at = index(text, separator)
    left = at ? substr(text, 1, at - 1) : text
    right = at ? substr(text, at + length(separator)) : ""
    return left
}

# One variable line: who takes its variables (all targets where it says nothing), and which values there are.
function read_line(line_names, line,    takers, count, each, i) {
    takers = ""
    if (line ~ /^for [a-z, -]+: /) {
        takers = part(substr(line, 5), ": ")
        line = right
    }
    count = split(line_names, each, ", ")
    for (i = 1; i <= count; i++) {
        variables[++variable_count] = each[i]
        known[each[i]] = 1
        if (line ~ /^[a-z0-9]+\|[a-z0-9|]+: /) choices[each[i]] = part(line, ": ")
        if (takers != "") takers_of[each[i]] = takers_of[each[i]] (takers_of[each[i]] == "" ? "" : ", ") takers
    }
    if (count > 2) line_names = each[1] " ..."
    count = split(takers, each, ", ")
    for (i = 1; i <= count; i++) taken[each[i]] = taken[each[i]] (taken[each[i]] == "" ? "" : ", ") line_names
}

function help(    last, i, name) {
    width = width < 80 ? 80 : width > 120 ? 120 : width
    print "make TARGET [VARIABLE=value ...]"
    print "as in: make sft SET=\"train.lr=1e-5\" DRY_RUN=1"
    print "In brackets: variables that not every target takes."
    for (i = 1; i <= target_count; i++) {
        name = targets[i]
        if (heading_of[name] != last) print "\n" (last = heading_of[name])
        entry(name, meaning[name], taken[name] == "" ? "" : "[" taken[name] "]")
    }
    for (i = 1; i <= lines; i++) {
        if (heading_of_line[i] != last) print "\n" (last = heading_of_line[i])
        entry(names[i], text[i])
    }
}

# A name and what it means, in two columns; what belongs behind it stays together where it can.
function entry(name, text, behind,    count, word, i, line) {
    line = sprintf("  %-13s", name)
    if (length(name) > 13) {
        print line
        line = sprintf("%15s", "")
    }
    count = split(text " " behind, word, " ")
    for (i = 1; i <= count; i++) {
        if (behind != "" && word[i] ~ /^\[/ && length(line) + length(behind) >= width) word[i] = "\n" word[i]
        if (word[i] ~ /^\n/ || (length(line) + length(word[i]) >= width && length(line) > 15)) {
            sub(/^\n/, "", word[i])
            print line
            line = sprintf("%15s", "")
        }
        line = line " " word[i]
    }
    print line
}

# What is wrong with the call, in said; empty where nothing is.
function complaint(    i, j, name, list, fits, goals) {
    for (i = 1; i <= calls; i++) {
        if (index(called[i], "=")) continue
        goals = goals " " called[i]
        if (!(called[i] in meaning))
            return said = "make knows no target " called[i] " -> " nearest(called[i], targets, target_count)
    }
    if (goals == "") goals = " help"
    for (i = 1; i <= calls; i++) {
        if (!index(called[i], "=")) continue
        name = part(called[i], "=")
        if (!(name in known)) {
            if (starred(name)) continue
            if (index(name, ".")) return said = "make knows no variable " name " -> write SET=\"" name "=" right "\""
            return said = "make knows no variable " name " -> " nearest(name, variables, variable_count)
        }
        if (name in choices && right != "" && index("|" choices[name] "|", "|" right "|") == 0)
            return said = name " is " spoken(choices[name]) ", not " right " -> " nearest_choice(right, choices[name])
        if (!(name in takers_of)) continue
        fits = 0
        for (j = split(goals, list, " "); j > 0; j--) if (index(", " takers_of[name] ", ", ", " list[j] ", ")) fits = 1
        if (!fits) return said = "make" goals " takes no " name " -> it is for " takers_of[name]
    }
    return ""
}

# Whether a line names it with a star: HCCL_*.
function starred(name,    each) {
    for (each in known) if (sub(/\*$/, "", each) && index(name, each) == 1) return 1
    return 0
}

function nearest_choice(word, choice,    list, count) {
    count = split(choice, list, "|")
    return nearest(word, list, count, spoken(choice))
}

function spoken(choice,    word) {
    while (split(choice, word, "|") > 2) sub(/\|/, ", ", choice)
    sub(/\|/, " or ", choice)
    return choice
}

# “did you mean …?” with the names that are nearest, or what else to do where none is near.
function nearest(word, list, count, otherwise,    i, now, best, found) {
    best = 1 + int(length(word) / 4)
    for (i = 1; i <= count; i++) {
        now = distance(toupper(word), toupper(list[i]))
        if (length(word) > 2 && index(toupper(list[i]), toupper(word)) == 1 && now > 1) now = 1 # only begun
        if (now > best) continue
        if (now < best) found = ""
        best = now
        if (index(" " found " ", " " list[i] " ") == 0) found = found (found == "" ? "" : " or ") list[i]
    }
    if (found != "") return "did you mean " found "?"
    return otherwise != "" ? "take " otherwise : "make help lists what there is"
}

# Letters to change, to add, to take out or to swap with their neighbour (optimal string alignment).
function distance(a, b,    i, j, d, least) {
    for (i = 0; i <= length(a); i++) d[i, 0] = i
    for (j = 0; j <= length(b); j++) d[0, j] = j
    for (i = 1; i <= length(a); i++)
        for (j = 1; j <= length(b); j++) {
            least = d[i - 1, j - 1] + (substr(a, i, 1) != substr(b, j, 1))
            if (d[i - 1, j] + 1 < least) least = d[i - 1, j] + 1
            if (d[i, j - 1] + 1 < least) least = d[i, j - 1] + 1
            if (i > 1 && j > 1 && substr(a, i, 1) == substr(b, j - 1, 1) && substr(a, i - 1, 1) == substr(b, j, 1) &&
                d[i - 2, j - 2] + 1 < least) least = d[i - 2, j - 2] + 1
            d[i, j] = least
        }
    return d[length(a), length(b)]
}
