//go:build !race

package stack

var buildFlags []string
