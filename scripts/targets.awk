# Prints the targets and variables of the Makefile (mode=help, help-all), or the variables that one target takes
# (mode=taken), or checks a call of make (mode=check).
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

/^##@/ { heading = $0 }
/^##= [^ ]/ { add(before(substr($0, 5), "  "), after($0, "  "), 1) }
/^##=  / { text[entries] = text[entries] " " after($0, "##=   ") }
/^[a-z][a-z-]*:.* ## / { add(before($0, ":"), after($0, " ## "), 0) }

END {
    for (i = 1; i <= entries; i++) if (is_variable[i]) note_takers(names[i], text[i])
    if (mode == "taken") { for (name in takers_of) if (index(", " takers_of[name] ", ", ", " target ", ")) print name }
    else if (mode != "check") help()
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

function add(name, meaning, variable) {
    names[++entries] = name
    text[entries] = meaning
    is_variable[entries] = variable
    heading_of[entries] = heading
    if (!variable) is_target[name] = 1
}

# Which targets take the variables of a line: takers_of each variable, and the variables that are taken by each target.
function note_takers(line_names, line,    takers, count, each, i) {
    takers = line ~ /^ *for [a-z, -]+: / ? before(after(line, "for "), ": ") : ""
    count = split(line_names, each, ", ")
    for (i = 1; i <= count; i++) takers_of[each[i]] = join(takers_of[each[i]], takers)
    if (count > 2) line_names = each[1] " ..."
    for (i = split(takers, each, ", "); i > 0; i--) taken[each[i]] = join(taken[each[i]], line_names)
}

function help(    variables, i, last) {
    width = width < 80 ? 80 : width > 120 ? 120 : width
    print "make TARGET [VARIABLE=value ...]"
    print "as in: make sft RECIPE=my.yaml SET=\"train.lr=1e-5 train.iterations=300\""
    for (variables = 0; variables < 2; variables++)
        for (i = 1; i <= entries; i++) {
            if (is_variable[i] != variables || (mode == "help" && heading_of[i] ~ /^##@[+]/)) continue
            if (heading_of[i] != last) print "\n" after(last = heading_of[i], " ")
            show(names[i], text[i], !variables && names[i] in taken ? "[" taken[names[i]] "]" : "")
        }
    if (mode == "help") print "\nmake help-all lists the other targets, and what the [VARIABLES] are."
}

# A name and its meaning in two columns; the variables in brackets go on a line of their own if they do not fit.
function show(name, text, variables,    count, word, i, line) {
    line = sprintf("  %-13s", name)
    count = split(text " " variables, word, " ")
    for (i = 1; i <= count; i++) {
        if (i == 1 ? length(name) > 13 : length(line) + length(word[i] ~ /^\[/ ? variables : word[i]) >= width) {
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
        if (!(words[i] in is_target)) return "make knows no target " words[i] " -> make help-all lists them"
    }
    if (goals == "") goals = " help"
    for (i = 1; i <= calls; i++) {
        if (!index(words[i], "=")) continue
        name = before(words[i], "=")
        if (!(name in takers_of) && !starred(name))
            return "make knows no variable " name " -> " remedy(name, after(words[i], "="))
        if (takers_of[name] == "") continue
        fits = 0
        for (j = split(goals, list, " "); j > 0; j--) if (index(", " takers_of[name] ", ", ", " list[j] ", ")) fits = 1
        if (!fits) return "make" goals " takes no " name " -> it is for " takers_of[name]
    }
}

# Whether a line names it with a star: HCCL_*.
function starred(name,    each) {
    for (each in takers_of) if (sub(/\*$/, "", each) && index(name, each) == 1) return 1
    return 0
}

# A variable that is a key of the recipe, or another tool's name of one, goes into SET.
function remedy(name, value,    line, field) {
    if (toupper(name) in takers_of) return "did you mean " toupper(name) "?"
    if (index(name, ".")) return "write SET=\"" name "=" value "\""
    while ((getline line < "recipes/synonyms.txt") > 0)
        if (split(line, field, " ") > 1 && field[1] == tolower(name))
            return "write SET=\"" field[2] "=" (3 in field ? "<" after(line, field[2] " ") ">" : value) "\""
    return "make help-all lists them"
}
