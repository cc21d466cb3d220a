# Prints the targets and variables of the Makefile (mode=help, help-all), or checks a call of make (mode=check).
#
#   awk -v mode=help -v width=80 -f scripts/targets.awk Makefile
#   awk -v mode=check -f scripts/targets.awk Makefile sft LR=1     targets, and variables with the first word of their value
#
#   ##@ Heading                                       ##@+ Heading: only in help-all
#   target: ## meaning
#   ##= NAME, NAME  for target, target: meaning       without “for …:” all targets take it
#   ##=   continued
#
# A wrong call is one line on stderr and exit code 1. Works with any POSIX awk.

BEGIN {
    for (i = 2; i < ARGC; i++) {
        words[++calls] = ARGV[i]
        ARGV[i] = "" # awk would read it as a file or an assignment
    }
}

/^##@/ {
    heading = $0
    sub(/^##@[+]? /, "", heading)
    if ($0 ~ /^##@[+]/) rest[heading] = 1
}
/^##= +[^ ]/ {
    more = $0
    if ($0 !~ /^##=  /) {
        names[++lines] = before(substr($0, 5), "  ")
        heading_of_line[lines] = heading
        more = after($0, "  ")
    }
    sub(/^(##=)? */, "", more)
    text[lines] = text[lines] (text[lines] == "" ? "" : " ") more
}
/^[a-z][a-z-]*:.* ## / {
    targets[++target_count] = name = before($0, ":")
    meaning[name] = after($0, " ## ")
    heading_of[name] = heading
}

END {
    for (i = 1; i <= lines; i++) read_variables(names[i], text[i])
    if (mode != "check") help()
    else if ((complaint = check()) != "") {
        print "openpangu-sft: " complaint | "cat >&2"
        exit 1
    }
}

function before(text, separator,    at) { return (at = index(text, separator)) ? substr(text, 1, at - 1) : text }
function after(text, separator,    at) {
    return (at = index(text, separator)) ? substr(text, at + length(separator)) : ""
}
function join(list, item) { return list (list == "" ? "" : ", ") item }

# Which targets take the variables of a line.
function read_variables(line_names, line,    takers, count, each, i) {
    takers = line ~ /^for [a-z, -]+: / ? before(substr(line, 5), ": ") : ""
    count = split(line_names, each, ", ")
    for (i = 1; i <= count; i++) {
        known[each[i]] = 1
        if (takers != "") takers_of[each[i]] = join(takers_of[each[i]], takers)
    }
    if (count > 2) line_names = each[1] " ..."
    count = split(takers, each, ", ")
    for (i = 1; i <= count; i++) taken[each[i]] = join(taken[each[i]], line_names)
}

function help(    last, i, name) {
    width = width < 80 ? 80 : width > 120 ? 120 : width
    print "make TARGET [VARIABLE=value ...]"
    print "as in: make sft RECIPE=my.yaml SET=\"train.lr=1e-5 train.iterations=300\""
    for (i = 1; i <= target_count; i++) {
        name = targets[i]
        if (mode == "help" && heading_of[name] in rest) continue
        if (heading_of[name] != last) print "\n" (last = heading_of[name])
        entry(name, meaning[name], taken[name] == "" ? "" : "[" taken[name] "]")
    }
    if (mode == "help") print "\nmake help-all lists the other targets, and what the [VARIABLES] are."
    for (i = 1; mode != "help" && i <= lines; i++) {
        if (heading_of_line[i] != last) print "\n" (last = heading_of_line[i])
        entry(names[i], text[i])
    }
}

# A name and its meaning in two columns; the variables in brackets go on a line of their own if they do not fit.
function entry(name, text, variables,    count, word, i, line) {
    line = sprintf("  %-13s", name)
    if (length(name) > 13) {
        print line
        line = sprintf("%15s", "")
    }
    count = split(text " " variables, word, " ")
    for (i = 1; i <= count; i++) {
        if (length(line) > 15 && length(line) + length(word[i] ~ /^\[/ ? variables : word[i]) >= width) {
            print line
            line = sprintf("%15s", "")
        }
        line = line " " word[i]
    }
    print line
}

# What is wrong with the call; empty if nothing is.
function check(    i, j, name, list, fits, goals) {
    for (i = 1; i <= calls; i++) {
        if (index(words[i], "=")) continue
        goals = goals " " words[i]
        if (!(words[i] in meaning)) return "make knows no target " words[i] " -> make help-all lists them"
    }
    if (goals == "") goals = " help"
    for (i = 1; i <= calls; i++) {
        if (!index(words[i], "=")) continue
        name = before(words[i], "=")
        if (!(name in known)) {
            if (starred(name)) continue
            return "make knows no variable " name " -> " remedy(name, after(words[i], "="))
        }
        if (!(name in takers_of)) continue
        fits = 0
        for (j = split(goals, list, " "); j > 0; j--) if (index(", " takers_of[name] ", ", ", " list[j] ", ")) fits = 1
        if (!fits) return "make" goals " takes no " name " -> it is for " takers_of[name]
    }
}

# Whether a line names it with a star: HCCL_*.
function starred(name,    each) {
    for (each in known) if (sub(/\*$/, "", each) && index(name, each) == 1) return 1
    return 0
}

# A variable that is a key of the recipe, or another tool's name of one, goes into SET.
function remedy(name, value,    line, key, field) {
    if (toupper(name) in known) return "did you mean " toupper(name) "?"
    if (index(name, ".")) key = name
    while (key == "" && (getline line < "recipes/synonyms.txt") > 0)
        if (split(line, field, " ") > 1 && field[1] == tolower(name)) {
            key = field[2]
            if (3 in field) value = "<" after(line, key " ") ">"
        }
    return key == "" ? "make help-all lists them" : "write SET=\"" key "=" value "\""
}
