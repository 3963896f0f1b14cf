# Prints "file:line: text" of C sources without comments and without what stands in string and character literals.
# (Include lines keep their name.)
FNR == 1 { in_comment = 0 }
{
    if (!in_comment && $0 ~ /^[ \t]*#[ \t]*include/) {
        print FILENAME ":" FNR ": " $0
        next
    }
    out = ""
    n = length($0)
    quote = ""
    for (i = 1; i <= n; i++) {
        c = substr($0, i, 1)
        two = substr($0, i, 2)
        if (in_comment) {
            if (two == "*/") { in_comment = 0; i++ }
        } else if (quote != "") {
            if (c == "\\") i++
            else if (c == quote) { quote = ""; out = out c }
        } else if (two == "/*") {
            in_comment = 1
            i++
        } else if (two == "//") {
            break
        } else {
            if (c == "\"" || c == "'") quote = c
            out = out c
        }
    }
    if (out ~ /[^ \t]/) print FILENAME ":" FNR ": " out
}
