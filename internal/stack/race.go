//go:build race

package stack

// With the race detector on in the test, it is on in our own processes too.
var buildFlags = []string{"-race"}
