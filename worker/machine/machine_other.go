//go:build !linux && !darwin && !windows

package machine

func own() string { return firstLine("/etc/machine-id", "/etc/hostid") }

func ram() int64 { return 0 }

func system() string { return "" }

func others() []gpu { return nil }
