// Reads a Modelfile and conversations as JSON, and writes the prompts that Ollama makes of them.
//
// It does what Ollama's parser, collation of messages and templates do (parser/parser.go, template/template.go), with
// Go's own text/template.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"text/template"
)

type function struct {
	Name        string     `json:"name"`
	Description string     `json:"description"`
	Parameters  parameters `json:"parameters"`
}

type parameters struct {
	Type       string         `json:"type"`
	Required   []string       `json:"required,omitempty"`
	Properties map[string]any `json:"properties"`
}

type tool struct {
	Type     string   `json:"type"`
	Function function `json:"function"`
}

func (t tool) String() string { return marshal(t) }

type arguments map[string]any

func (a arguments) String() string { return marshal(map[string]any(a)) }

type call struct {
	Function struct {
		Name      string    `json:"name"`
		Arguments arguments `json:"arguments"`
	} `json:"function"`
}

type message struct {
	Role      string `json:"role"`
	Content   string `json:"content"`
	ToolCalls []call `json:"tool_calls"`
}

type conversation struct {
	Messages []message `json:"messages"`
	Tools    []tool    `json:"tools"`
}

type input struct {
	Modelfile     string         `json:"modelfile"`
	Conversations []conversation `json:"conversations"`
}

type command struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

type output struct {
	Commands []command `json:"commands"`
	Prompts  []string  `json:"prompts"`
}

func main() {
	var given input
	check(json.NewDecoder(os.Stdin).Decode(&given))
	made := output{Commands: commands(given.Modelfile)}
	system, source := "", ""
	for _, c := range made.Commands {
		switch c.Name {
		case "system":
			system = c.Value
		case "template":
			source = c.Value
		}
	}
	parsed, err := template.New("").Option("missingkey=zero").Funcs(template.FuncMap{"json": marshal}).Parse(source)
	check(err)
	for _, c := range given.Conversations {
		made.Prompts = append(made.Prompts, prompt(parsed, system, c))
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	check(encoder.Encode(made))
}

// prompt returns what a template makes of a conversation; those without a system message get the Modelfile's.
func prompt(parsed *template.Template, system string, c conversation) string {
	messages := c.Messages
	if system != "" && messages[0].Role != "system" {
		messages = append([]message{{Role: "system", Content: system}}, messages...)
	}
	var systems []string
	var collated []*message
	for at := range messages {
		current := messages[at]
		if current.Role == "system" {
			systems = append(systems, current.Content)
		}
		last := len(collated) - 1
		if last >= 0 && collated[last].Role == current.Role && current.Role != "tool" {
			collated[last].Content += "\n\n" + current.Content
		} else {
			collated = append(collated, &current)
		}
	}
	var text strings.Builder
	check(parsed.Execute(&text, map[string]any{
		"System": strings.Join(systems, "\n\n"), "Messages": collated, "Tools": c.Tools, "Response": "", "Prompt": "",
	}))
	return text.String()
}

// commands parses a Modelfile: a value ends with its line, unless it begins with quotes that are not closed.
func commands(text string) []command {
	var made []command
	for text != "" {
		text = strings.TrimLeft(text, " \t\r\n")
		if text == "" {
			break
		}
		name, rest, _ := strings.Cut(text, " ")
		name = strings.ToLower(name)
		if name == "parameter" {
			name, rest, _ = strings.Cut(rest, " ")
		} else if !strings.Contains(" from adapter template system ", " "+name+" ") {
			check(fmt.Errorf("no command: %q", name))
		}
		end, value := 0, ""
		for ok := false; !ok; {
			if end >= len(rest) {
				check(fmt.Errorf("a value of %s does not end", name))
			}
			if next := strings.IndexAny(rest[end:], "\r\n"); next < 0 {
				end = len(rest)
			} else {
				end += next
			}
			value, ok = unquote(strings.TrimSpace(printable(rest[:end])))
			if !ok {
				end++
			}
		}
		made = append(made, command{name, value})
		text = rest[end:]
	}
	return made
}

// printable leaves out what Ollama's parser does.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if strconv.IsPrint(r) || strings.ContainsRune(" \t\r\n", r) {
			return r
		}
		return -1
	}, text)
}

func unquote(text string) (string, bool) {
	for _, quotes := range []string{`"""`, `"`} {
		if strings.HasPrefix(text, quotes) {
			ok := len(text) >= 2*len(quotes) && strings.HasSuffix(text, quotes)
			if !ok {
				return "", false
			}
			return text[len(quotes) : len(text)-len(quotes)], true
		}
	}
	return text, true
}

func marshal(value any) string {
	made, err := json.Marshal(value)
	check(err)
	return string(made)
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
