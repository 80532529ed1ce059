// Package tap is what the OCI validation suite prints its results with: the part of github.com/mndrix/tap-go that the
// suite uses, written anew, because Debian has no package of it. scripts/oci-validation puts it in its place.
package tap

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
)

// T counts and prints the results of one program.
type T struct {
	count *int
	todo  bool
}

// New begins to count.
func New() *T { return &T{count: new(int)} }

// Header announces a number of results; zero: it is said at the end, with AutoPlan.
func (t *T) Header(results int) {
	fmt.Println("TAP version 13")
	if results > 0 {
		fmt.Printf("1..%d\n", results)
	}
}

// AutoPlan says how many results there were.
func (t *T) AutoPlan() { fmt.Printf("1..%d\n", *t.count) }

// Ok prints a result.
func (t *T) Ok(passed bool, description string) {
	word := "ok"
	if !passed {
		word = "not ok"
	}
	*t.count++
	separator := "-"
	if t.todo {
		separator = "# TODO"
	}
	fmt.Printf("%s %d %s %s\n", word, *t.count, separator, description)
}

// Pass is a good result.
func (t *T) Pass(description string) { t.Ok(true, description) }

// Fail is a bad result.
func (t *T) Fail(description string) { t.Ok(false, description) }

// Skip is a number of results that are not to be had.
func (t *T) Skip(results int, why string) {
	for i := 0; i < results; i++ {
		*t.count++
		fmt.Printf("ok %d # SKIP %s\n", *t.count, why)
	}
}

// Todo is a T whose bad results do not count.
func (t *T) Todo() *T { return &T{count: t.count, todo: true} }

// Diagnostic prints a remark.
func (t *T) Diagnostic(text string) {
	for _, line := range strings.Split(text, "\n") {
		fmt.Printf("# %s\n", line)
	}
}

// Diagnosticf prints a remark.
func (t *T) Diagnosticf(format string, arguments ...interface{}) {
	t.Diagnostic(fmt.Sprintf(format, arguments...))
}

// YAML prints what belongs to the last result. JSON is YAML.
func (t *T) YAML(value interface{}) error {
	text, err := json.MarshalIndent(value, "  ", "  ")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(os.Stdout, "  ---\n  %s\n  ...\n", text)
	return err
}
